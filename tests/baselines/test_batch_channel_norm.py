"""Batch-Channel Normalization against its equations in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kalman_flax import KalmanState, Signal, merge_running
from kalman_flax.baselines.batch_channel_norm import BatchChannelNorm
from tests.reference.checks import (
    DEGENERATE,
    TwoSteps,
    assert_finite,
    directional,
    each_degenerate,
)

KEY = jax.random.key(0)
EPSILON, MOMENTUM = 1e-3, 0.75
AXES = (0, 1, 2)
PARAMS = {
    "scale": np.array([0.5, -1.0, 2.0, 1.5]),
    "bias": np.array([0.3, 0.0, -0.2, 0.1]),
    "group_scale": np.array([1.5, 0.7]),
    "group_bias": np.array([-0.4, 0.2]),
}
STATS = {
    "streaming_mean": np.arange(4.0),
    "streaming_var": np.array([0.5, 1.0, 2.0, 4.0]),
}
MASK = np.arange(12).reshape(1, 3, 4, 1) % 3 > 0


def make(**options):
    return BatchChannelNorm(
        **{"momentum": MOMENTUM, "epsilon": EPSILON, "num_groups": 2} | options
    )


@pytest.fixture
def x():
    return 1 + 2 * np.random.default_rng(0).normal(size=(2, 3, 4, 4))


def single(tree):
    return jax.tree.map(jnp.float32, tree)


def moved(stats, x, mask=None):
    """The statistics after a step on `x`, which the step itself uses."""
    where = np.broadcast_to(True if mask is None else mask, x.shape)
    mean, var = stats["streaming_mean"], stats["streaming_var"]
    spread = np.mean((x - mean) ** 2, AXES, where=where)
    return {
        "streaming_mean": MOMENTUM * mean
        + (1 - MOMENTUM) * np.mean(x, AXES, where=where),
        "streaming_var": MOMENTUM * var + (1 - MOMENTUM) * spread,
    }


def equations(x, params, stats, mask=None):
    """Group by group, by the statistics given."""
    where = np.broadcast_to(True if mask is None else mask, x.shape)
    std = np.sqrt(stats["streaming_var"] + EPSILON)
    u = params["scale"] * (x - stats["streaming_mean"]) / std + params["bias"]
    y = np.empty_like(u)
    for n, g in np.ndindex(len(x), 2):
        group = n, slice(None), slice(None), slice(2 * g, 2 * g + 2)
        kept = u[group][where[group]]
        y[group] = (u[group] - kept.mean()) / np.sqrt(kept.var() + EPSILON)
        y[group] = params["group_scale"][g] * y[group] + params["group_bias"][g]
    return y


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
@pytest.mark.parametrize("inference", [False, True])
def test_values_gradients_and_statistics(x, inference, mask):
    after = STATS if inference else moved(STATS, x, mask)

    def ours(x, params):
        variables = {"params": params, "batch_stats": single(STATS)}
        return make().apply(variables, x, inference, mask=mask, mutable=["batch_stats"])

    def theirs(x, params):
        return equations(x, params, after, mask)  # statistics are constants

    y, written = ours(*single((x, PARAMS)))
    np.testing.assert_allclose(y, theirs(x, PARAMS), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(written["batch_stats"], single(after), rtol=1e-5)
    actual, expected = directional(lambda *a: ours(*a)[0], theirs, (x, PARAMS))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


def test_initial_values_and_bare(x):
    variables = make().init(KEY, single(x), False)
    assert jax.tree.map(lambda leaf: leaf.tolist(), variables) == {
        "params": {
            "scale": [1.0] * 4,
            "bias": [0.0] * 4,
            "group_scale": [1.0] * 2,
            "group_bias": [0.0] * 2,
        },
        "batch_stats": {"streaming_mean": [0.0] * 4, "streaming_var": [1.0] * 4},
    }
    bare = make(use_scale=False, use_bias=False)
    y, variables = bare.init_with_output(KEY, single(x), True)
    assert "params" not in variables
    expected, _ = make().init_with_output(KEY, single(x), True)
    chex.assert_trees_all_equal(y, expected)


@pytest.fixture
def apart():
    """Two images of different means, which is where merging can go wrong."""
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 4))
    return jnp.float32(x + np.array([0.0, 5.0]).reshape(2, 1, 1, 1))


def test_replicas_merge_as_if_one_had_held_all_examples(apart):
    variables = {"params": single(PARAMS), "batch_stats": single(STATS)}

    def stats(x):
        _, written = make().apply(variables, x, False, mutable=["batch_stats"])
        return written["batch_stats"]

    merged = merge_running(jax.vmap(stats)(apart[:, None]), MOMENTUM)
    chex.assert_trees_all_close(merged, stats(apart), rtol=1e-5)


def test_devices_share_the_statistics(apart):
    norm = make(axis_name="device")
    variables = norm.init(KEY, apart, False)

    def forward(norm, x):
        return norm.apply(variables, x, False, mutable=["batch_stats"])

    mesh = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec("device"), PartitionSpec()
    shared = jax.shard_map(
        functools.partial(forward, norm), mesh=mesh, in_specs=specs[:1], out_specs=specs
    )
    expected = forward(make(), apart)
    chex.assert_trees_all_close(jax.jit(shared)(apart), expected, rtol=1e-4, atol=1e-5)


@each_degenerate
def test_degenerate_inputs(case):
    value = DEGENERATE[case]
    norm = make(use_running_average=False, dtype=value.dtype)
    y = assert_finite(norm, value)
    assert y.dtype == value.dtype


def test_contract_of_signals(x):
    norm = make(use_running_average=False)
    x = single(x)
    signal = Signal(x, KalmanState(0.0, 1.0))
    variables = norm.init(KEY, x)
    y, _ = norm.apply(variables, signal, mutable=["batch_stats"])
    assert y.state is None
    value, _ = norm.apply(variables, x, mutable=["batch_stats"])
    chex.assert_trees_all_equal(y.value, value)
    (apart, stream), _ = TwoSteps(norm).init_with_output(KEY, signal)
    chex.assert_trees_all_equal((apart, stream), (y, signal))
    first, _ = norm.clone(axis=1).apply(
        variables, jnp.moveaxis(x, -1, 1), mutable=["batch_stats"]
    )
    chex.assert_trees_all_close(jnp.moveaxis(first, 1, -1), value, rtol=1e-5)


@pytest.mark.parametrize("num_groups", [3, 0, -2])
def test_group_counts_that_do_not_fit_are_refused(x, num_groups):
    with pytest.raises(ValueError, match=rf"num_groups is {num_groups}[,;]"):
        make(num_groups=num_groups).init(KEY, single(x), True)
