"""Normalisers by name."""

import jax.numpy as jnp
import pytest

import kalman_flax as kf
from kalman_flax import KalmanNorm, KalmanState

CLASSES = {
    "batch": kf.baselines.BatchNorm,
    "batch_channel": kf.baselines.BatchChannelNorm,
    "batch_renorm": kf.baselines.BatchRenorm,
    "cross_iteration": kf.baselines.CrossIterationBatchNorm,
    "evonorm_b0": kf.baselines.EvoNormB0,
    "evonorm_s0": kf.baselines.EvoNormS0,
    "filter_response": kf.baselines.FilterResponseNorm,
    "frozen_batch": kf.baselines.FrozenBatchNorm,
    "group": kf.baselines.GroupNorm,
    "group_kalman": kf.GroupKalmanNorm,
    "group_kalman_paper": kf.PaperGroupKalmanNorm,
    "instance": kf.baselines.InstanceNorm,
    "kalman": KalmanNorm,
    "kalman_mc": KalmanNorm,
    "kalman_paper": kf.PaperKalmanNorm,
    "kalman_paper_literal": kf.LiteralPaperKalmanNorm,
    "kalman_paper_mc": kf.PaperKalmanNorm,
    "kalman_released": kf.ReleasedKalmanNorm,
    "layer": kf.baselines.LayerNorm,
    "moving_average": kf.baselines.MovingAverageBatchNorm,
    "normalizer_free": kf.baselines.Bias,
    "online": kf.baselines.OnlineNorm,
    "proxy_group": kf.baselines.ProxyNorm,
    "weight": kf.baselines.Bias,
}
NO_MOMENTUM = {
    "evonorm_s0",
    "filter_response",
    "group",
    "group_kalman",
    "group_kalman_paper",
    "instance",
    "layer",
    "normalizer_free",
    "online",
    "proxy_group",
    "weight",
}
#: normalisers with a nonlinearity of their own, or that ask for another
ACTIVATED = {
    "evonorm_b0",
    "evonorm_s0",
    "filter_response",
    "normalizer_free",
    "proxy_group",
}


KERNEL_MAP = {
    "": None,
    "_ws": kf.standardize_kernel,
    "_wc": kf.centre_kernel,
}


def made(entry):
    """The normaliser that a network would get from the entry."""
    return entry.norm(use_running_average=True, dtype=jnp.float32, name="norm")


@pytest.mark.parametrize("suffix", ["", *kf.registry.KERNEL_MAPS])
@pytest.mark.parametrize("name", CLASSES)
def test_names(name, suffix):
    entry = kf.normalization(name + suffix, momentum=0.7, axis_name="d")
    norm = made(entry)
    assert type(norm) is CLASSES[name]
    has_momentum = name not in NO_MOMENTUM
    if not has_momentum:  # statistics of one image are shared with no other
        assert getattr(norm, "axis_name", None) is None
    assert getattr(norm, "momentum", None) == (0.7 if has_momentum else None)
    if name in ("normalizer_free", "weight") and suffix:
        with pytest.raises(ValueError, match=f"out .*{suffix}"):
            entry.conv(8, (3, 3))
        return
    conv = entry.conv(8, (3, 3))
    conv = getattr(conv, "layer_instance", conv)  # inside Flax's WeightNorm
    assert isinstance(conv, kf.Conv)
    if name == "normalizer_free":
        assert isinstance(conv.kernel_map, kf.baselines.ScaledStandardization)
    else:
        centred = kf.centre_kernel if name == "moving_average" else None
        assert conv.kernel_map is (KERNEL_MAP[suffix] or centred)
    assert (conv.transition == "monte_carlo") == name.endswith("_mc")
    known = None if name == "kalman_released" else KalmanState(0.0, 1.0)
    assert entry.input_state == known
    assert (entry.activation is not kf.relu) == (name in ACTIVATED)


def test_all_names_are_tested():
    assert set(kf.NORMALIZERS) == set(CLASSES)


def test_presets():
    for name in (
        "group",
        "group_kalman",
        "evonorm_s0",
        "proxy_group",
        "batch_channel",
    ):  # as in the released code
        assert made(kf.normalization(name)).num_groups == 4
    kalman, paper, released = (
        made(kf.normalization(name))
        for name in ("kalman", "kalman_paper", "kalman_released")
    )
    assert (kalman.propagate, kalman.rule, kalman.noise) == (
        "normalized",
        "mixture",
        None,
    )
    literal = made(kf.normalization("kalman_paper_literal"))
    assert (paper.propagate, literal.propagate) == ("normalized", "raw")
    for norm in (paper, literal, made(kf.normalization("group_kalman_paper"))):
        assert (norm.rule, norm.noise, norm.learn_gain, norm.gain) == (
            "paper",
            "additive",
            "scalar",
            0.1,
        )
    assert (released.propagate, released.rule) == ("raw", "mixture")
    assert released.noise is None
    assert (paper.learn_gain, released.learn_gain) == ("scalar", None)
    assert (released.gain, released.outlier_ratio) == (0.1, 100.0)


def test_options_set_attributes_and_override_presets():
    norm = made(kf.normalization("kalman_paper_ws", gain=0.25, propagate="raw"))
    assert (norm.gain, norm.propagate, norm.rule) == (0.25, "raw", "paper")
    assert made(kf.normalization("group", num_groups=2)).num_groups == 2


def test_looking_up_leaves_the_registry_alone():
    kf.normalization("kalman", momentum=0.5, gain=0.5)
    assert made(kf.NORMALIZERS["kalman"]).gain == 0.02
    assert made(kf.normalization("kalman")).momentum == 0.99


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'kalmann'") as error:
        kf.normalization("kalmann")
    for name in kf.NORMALIZERS:
        assert name in str(error.value)


@pytest.mark.parametrize(
    "name, known", [("kalman_ws", "propagate"), ("group", "num_groups")]
)
def test_unknown_attribute_lists_the_known(name, known):
    with pytest.raises(ValueError, match=rf"{name}.*gainn.*{known}"):
        kf.normalization(name, gainn=0.5)


@pytest.mark.parametrize(
    "name, option, value",
    [
        ("kalman", "gain", "4"),
        ("kalman", "gain", None),
        ("kalman", "decay_steps", "4"),
        ("group", "num_groups", "4"),
    ],
)
def test_what_is_no_number_is_refused(name, option, value):
    with pytest.raises(ValueError, match=rf"\.{option} is {value!r}; expected a"):
        kf.normalization(name, **{option: value})


def test_no_number_where_that_means_something():
    norm = kf.normalization("group", num_groups=None, group_size=4).norm()
    assert norm.num_groups is None
