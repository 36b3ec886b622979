"""Normalisers by name."""

import jax.numpy as jnp
import pytest

import kalman_flax as kf
from kalman_flax import KalmanNorm, KalmanState

MOMENTUM = ("batch", "kalman", "kalman_mc", "kalman_paper", "kalman_released")


def made(entry):
    """The normaliser that a network would get from the entry."""
    return entry.norm(use_running_average=True, dtype=jnp.float32, name="norm")


@pytest.mark.parametrize("suffix", ["", "_ws"])
@pytest.mark.parametrize("name", [*MOMENTUM, "group"])
def test_names(name, suffix):
    entry = kf.normalization(name + suffix, momentum=0.7)
    norm = made(entry)
    assert getattr(norm, "momentum", None) == (0.7 if name in MOMENTUM else None)
    conv = entry.conv(8, (3, 3))
    assert isinstance(conv, kf.Conv)
    assert (conv.kernel_map is kf.standardize_kernel) == (suffix == "_ws")
    assert (conv.transition == "monte_carlo") == (name == "kalman_mc")
    known = None if name == "kalman_released" else KalmanState(0.0, 1.0)
    assert entry.input_state == known


def test_all_names_are_tested():
    names = {*MOMENTUM, "group"}
    assert set(kf.NORMALIZERS) == names | {f"{name}_ws" for name in names}


def test_classes_and_presets():
    assert isinstance(made(kf.normalization("batch")), kf.BatchNorm)
    group = made(kf.normalization("group"))
    assert isinstance(group, kf.GroupNorm)
    assert group.num_groups == 4
    kalman, paper, released = (
        made(kf.normalization(name))
        for name in ("kalman", "kalman_paper", "kalman_released")
    )
    assert {type(n) for n in (kalman, paper, released)} == {KalmanNorm}
    assert (kalman.hand_on, kalman.rule, kalman.noise) == (
        "normalized",
        "mixture",
        None,
    )
    assert (paper.hand_on, paper.rule, paper.noise) == ("raw", "paper", "additive")
    assert (released.hand_on, released.rule, released.noise) == ("raw", "mixture", None)
    assert (paper.learn_gain, released.learn_gain) == ("scalar", None)
    assert (released.gain, released.outlier_ratio) == (0.1, 100.0)


def test_options_set_attributes_and_override_presets():
    norm = made(kf.normalization("kalman_paper_ws", gain=0.25, hand_on="normalized"))
    assert (norm.gain, norm.hand_on, norm.rule) == (0.25, "normalized", "paper")
    assert made(kf.normalization("group", num_groups=2)).num_groups == 2


def test_looking_up_leaves_the_registry_alone():
    kf.normalization("kalman", momentum=0.5, gain=0.5)
    assert made(kf.NORMALIZERS["kalman"]).gain == 0.1
    assert made(kf.normalization("kalman")).momentum == 0.99


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'kalmann'") as error:
        kf.normalization("kalmann")
    for name in kf.NORMALIZERS:
        assert name in str(error.value)


@pytest.mark.parametrize(
    "name, known", [("kalman_ws", "hand_on"), ("group", "num_groups")]
)
def test_unknown_attribute_lists_the_known(name, known):
    with pytest.raises(ValueError, match=rf"{name}.*gainn.*{known}"):
        kf.normalization(name, gainn=0.5)
