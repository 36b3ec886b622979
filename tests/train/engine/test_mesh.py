"""The same training on any number of devices, in one part or several."""

import functools

import chex
import jax
import numpy as np
import pytest

from benchmarks.hlo import collectives
from kalman_flax import NORMALIZERS
from tests.reference.slow import few_quick
from tests.train import common
from tests.train.common import batch, build, tiny_config
from train.engine.experiment import build as build_anew
from train.engine.mesh import make_mesh

INDEX = np.arange(16)
config_of = functools.partial(
    tiny_config, batch_size=16, crop_padding=1, flip=True, weight_decay=0.01
)


@functools.cache
def trained(devices, options=(), **overrides):
    """What two updates on so many devices leave, on the host."""
    config = config_of(**overrides, norm_options=dict(options))
    experiment = common.build(config, devices=jax.devices()[:devices])
    assert experiment.mesh.size == devices
    state, metrics = experiment.state, []
    for _ in range(2):
        state, seen = experiment.train_step(state, batch(experiment, INDEX))
        metrics.append(seen)
    return jax.device_get((state, metrics))


def assert_same_training(actual, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=2e-3, atol=2e-5)


CALIBRATED = (("calibrate", "both"), ("decay_steps", 3))


# Histories of the forward pass, corrections, and a count of steps; histories of the
# backward pass; random numbers of each replica.
@pytest.mark.parametrize("norm, options", [
    ("kalman_wc", CALIBRATED),
    ("moving_average", ()),
    pytest.param("kalman_mc", (), marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize(
    "devices, accumulate", [pytest.param(8, 1, marks=pytest.mark.slow), (2, 2)]
)
def test_devices_and_parts_change_nothing(norm, options, devices, accumulate):
    """One device that runs all replicas at once is tested against a loop elsewhere."""
    keys = {"norm": norm, "options": options}
    assert_same_training(
        trained(devices, **keys, accumulate=accumulate), trained(1, **keys)
    )


@pytest.mark.parametrize("norm", few_quick(NORMALIZERS))
def test_every_normalizer_trains_under_shard_map(norm):
    """It refuses values that should vary over devices and do not, when it traces."""
    experiment = build(config_of(norm=norm))
    given = experiment.state, batch(experiment, INDEX), experiment.key, experiment.rates
    state, _ = jax.eval_shape(experiment.update, *given)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, experiment.state)


def test_parts_in_a_loop(monkeypatch):
    """What accelerators run."""
    keys = {"norm": "kalman_wc", "options": CALIBRATED}
    expected = trained(1, **keys)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(common, "build", build_anew)
    actual = trained.__wrapped__(1, **keys, accumulate=4)
    assert_same_training(actual, expected)


def test_what_devices_see_differs():
    """Or the test above would pass with gradients and statistics of one of them."""
    mirrored = batch(build(config_of()), np.roll(INDEX, 2))
    assert mirrored.images.sharding.num_devices == 8
    shards = [np.asarray(shard.data) for shard in mirrored.images.addressable_shards]
    assert len({shard.tobytes() for shard in shards}) == 8


@pytest.mark.parametrize("norm", few_quick(["batch", "kalman"], ["kalman"]))
def test_synchronised_statistics_are_those_of_one_large_micro_batch(norm):
    """Over the replicas of a device and over devices."""
    assert_same_training(
        trained(4, norm=norm, sync_statistics=True),
        trained(1, norm=norm, micro_batch_size=16),
    )


def lower(experiment, index):
    given = experiment.state, batch(experiment, index)
    return experiment.update.lower(*given, experiment.key, experiment.rates)


def compiled(**overrides):
    experiment = build(config_of(**overrides))
    lowered = lower(experiment, INDEX)
    return lowered.compile()


def test_normalisation_issues_no_collective():
    """One all-reduce of means; one of gradients, metrics and variances, which need the
    means; no float more than that."""
    found = collectives(compiled(norm="kalman").as_text())
    assert [one.kind for one in found] == ["all-reduce"] * 2
    state = build(config_of(norm="kalman")).state
    count = sum(
        leaf.size for leaf in jax.tree.leaves((state.params, state.batch_stats))
    )
    assert sum(one.size for one in found) == 4 * (count + 2)  # loss and accuracy

    synchronised = compiled(norm="kalman", sync_statistics=True).as_text()
    assert len(collectives(synchronised)) > 10


@pytest.mark.parametrize("accumulate", few_quick([1, 2], [2]))
def test_gradients_of_convolutions_are_fast_on_the_cpu(accumulate):
    """XLA:CPU is slow where the output is the kernel; outside of loops it turns such
    convolutions around first."""
    assert "->01bf" not in compiled(accumulate=accumulate).as_text()


@pytest.mark.slow  # beside test_parts_in_a_loop
def test_parts_need_less_memory():
    def size(accumulate):
        experiment = build(
            config_of(batch_size=32, accumulate=accumulate), devices=jax.devices()[:1]
        )
        lowered = lower(experiment, np.arange(32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert size(4) < 0.5 * size(1)


def test_as_many_devices_as_split_the_micro_batches(monkeypatch):
    assert [make_mesh(replicas).size for replicas in (64, 12, 1)] == [8, 4, 1]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"12 micro-batches .* 8 devices of 2 proc"):
        make_mesh(12)


def test_parts_must_divide_the_micro_batches():
    with pytest.raises(ValueError, match=r"8 micro-batches .* accumulate = 3 equal"):
        build(config_of(accumulate=3))
