"""EvoNorm-B0 and -S0, against their equations in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kalman_flax import KalmanState, Signal
from kalman_flax.baselines.evonorm import EvoNormB0, EvoNormS0
from kalman_flax.inference.running import merge_running
from tests.reference.checks import (
    DEGENERATE,
    TwoSteps,
    assert_finite,
    directional,
    each_degenerate,
)
from tests.reference.slow import few_quick

KEY = jax.random.key(0)
TRAIN, INFER = {"use_running_average": False}, {"use_running_average": True}
AFFINE = {
    "scale": np.array([0.5, -1.0, 2.0, 1.5]),
    "bias": np.array([0.3, 0.0, -0.2, 0.1]),
}
PARAMS = AFFINE | {"nonlinearity_scale": np.array([1.0, 0.4, -0.8, 2.0])}
BARE = {"nonlinearity_scale": PARAMS["nonlinearity_scale"]}
STATS = {"mean": np.arange(4.0), "var": np.array([0.5, 1.0, 2.0, 4.0])}
MASK = np.arange(12).reshape(1, 3, 4, 1) % 3 > 0


@pytest.fixture
def x():
    return 1 + 2 * np.random.default_rng(0).normal(size=(2, 3, 4, 4))


def biased(values):
    return np.mean((values - np.mean(values)) ** 2)


def affine(y, params):
    return params.get("scale", 1.0) * y + params.get("bias", 0.0)


def broadcast_mask(x, mask):
    return np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)


def b0(x, params, var=None, epsilon=1e-5, mask=None):
    """`var` [C] in inference; that of the micro-batch in training."""
    x = np.asarray(x, np.float64)
    mask = broadcast_mask(x, mask)
    y = np.empty_like(x)
    for n, c in np.ndindex(x.shape[0], x.shape[-1]):
        batch = biased(x[..., c][mask[..., c]]) if var is None else var[c]
        one = x[n, ..., c]
        right = params["nonlinearity_scale"][c] * one
        right = right + np.sqrt(biased(one[mask[n, ..., c]]) + epsilon)
        y[n, ..., c] = one / np.maximum(np.sqrt(batch + epsilon), right)
    return affine(y, params)


def s0(x, params, groups, epsilon=1e-5, mask=None):
    x = np.asarray(x, np.float64)
    mask = broadcast_mask(x, mask)
    y = np.empty_like(x)
    size = x.shape[-1] // groups
    for n, c in np.ndindex(x.shape[0], x.shape[-1]):
        group = slice(c // size * size, (c // size + 1) * size)
        var = biased(x[n, ..., group][mask[n, ..., group]])
        one = x[n, ..., c]
        gate = 1 / (1 + np.exp(-params["nonlinearity_scale"][c] * one))
        y[n, ..., c] = one * gate / np.sqrt(var + epsilon)
    return affine(y, params)


NO_AFFINE = {"use_scale": False, "use_bias": False}
CASES = {
    "B0": (EvoNormB0(False), PARAMS, b0, {}),
    "B0 mask": (EvoNormB0(False), PARAMS, b0, {"mask": MASK}),
    "B0 bare": (EvoNormB0(False, **NO_AFFINE), BARE, b0, {}),
    "B0 epsilon": (EvoNormB0(False, epsilon=0.5), PARAMS, b0, {"epsilon": 0.5}),
    "B0 inference": (EvoNormB0(True), PARAMS, b0, {"var": STATS["var"]}),
    "S0": (EvoNormS0(num_groups=2), PARAMS, s0, {"groups": 2}),
    "S0 one": (EvoNormS0(num_groups=1), PARAMS, s0, {"groups": 1}),
    "S0 mask": (EvoNormS0(num_groups=2), PARAMS, s0, {"groups": 2, "mask": MASK}),
    "S0 bare": (EvoNormS0(num_groups=4, **NO_AFFINE), BARE, s0, {"groups": 4}),
    "S0 epsilon": (
        EvoNormS0(num_groups=2, epsilon=0.5), PARAMS, s0, {"groups": 2, "epsilon": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, x):
    norm, params, equations, options = CASES[case]
    stats = STATS if isinstance(norm, EvoNormB0) else {}
    variables = norm.init(KEY, jnp.float32(x))
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(
        np.shape, params
    )
    assert set(variables.get("batch_stats", {})) == set(stats)

    def ours(x, params):
        variables = {"params": params, "batch_stats": jax.tree.map(jnp.float32, stats)}
        mask = options.get("mask")
        return norm.apply(variables, x, mask=mask, mutable=["batch_stats"])[0]

    def theirs(x, params):
        return equations(x, params, **options)

    single = jax.tree.map(jnp.float32, (x, params))
    np.testing.assert_allclose(ours(*single), theirs(x, params), rtol=1e-4, atol=1e-5)
    actual, expected = directional(ours, theirs, (x, params))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", [EvoNormB0(False), EvoNormS0(num_groups=2)], ids=str)
def test_initial_values_are_those_of_the_official_code(norm, x):
    params = norm.init(KEY, jnp.float32(x))["params"]
    expected = {"scale": 1.0, "bias": 0.0, "nonlinearity_scale": 1.0}
    assert jax.tree.map(lambda p: p.tolist(), params) == {
        name: [value] * 4 for name, value in expected.items()
    }


def test_running_statistics_are_biased_averages(x):
    norm = EvoNormB0(False, momentum=0.75)
    variables = norm.init(KEY, jnp.float32(x))
    mean, var = np.zeros(4), np.ones(4)
    chex.assert_trees_all_equal(variables["batch_stats"], {"mean": mean, "var": var})
    for step in range(2):
        batch = x * (1 + step)
        _, stats = norm.apply(variables, jnp.float32(batch), mutable=["batch_stats"])
        variables |= stats
        mean = 0.75 * mean + 0.25 * batch.mean((0, 1, 2))
        var = 0.75 * var + 0.25 * batch.var((0, 1, 2))
    expected = {"mean": mean, "var": var}
    chex.assert_trees_all_close(variables["batch_stats"], expected, rtol=1e-5)
    norm = norm.clone(use_running_average=True)
    _, stats = norm.apply(variables, jnp.float32(x), mutable=["batch_stats"])
    chex.assert_trees_all_equal(stats["batch_stats"], variables["batch_stats"])


def test_replicas_merge_as_if_one_had_held_all_examples(x):
    norm = EvoNormB0(False, momentum=0.75)
    x = jnp.float32(x + np.array([0.0, 5.0]).reshape(2, 1, 1, 1))
    variables = norm.init(KEY, x)

    def stats(x):
        return norm.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

    merged = merge_running(jax.vmap(stats)(x[:, None]), 0.75)
    # The running average starts from one, and so do both.
    chex.assert_trees_all_close(merged, stats(x), rtol=1e-5)


def test_devices_share_the_variance_of_the_batch(x):
    x = jnp.float32(x + np.array([0.0, 5.0]).reshape(2, 1, 1, 1))
    norm = EvoNormB0(False, axis_name="device")
    variables = norm.init(KEY, x)

    def forward(x):
        y, updates = norm.apply(variables, x, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    mesh = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec("device"), PartitionSpec()
    shared = jax.shard_map(forward, mesh=mesh, in_specs=specs[:1], out_specs=specs)
    alone = EvoNormB0(False).apply(variables, x, mutable=["batch_stats"])
    expected = (alone[0], alone[1]["batch_stats"])
    chex.assert_trees_all_close(jax.jit(shared)(x), expected, rtol=1e-5, atol=1e-6)


@each_degenerate
@pytest.mark.parametrize("name", few_quick(["B0", "B0 inference", "S0"], ["B0", "S0"]))
def test_degenerate_inputs(name, case):
    norm, _, equations, options = CASES[name]
    value = DEGENERATE[case]
    y = assert_finite(norm.clone(dtype=value.dtype), value)
    assert y.dtype == value.dtype
    if value.dtype == jnp.float32:
        params = {"nonlinearity_scale": np.ones(4)}
        if "var" in options:
            options = {"var": np.ones(4)}
        # At 1e4 the data themselves have four digits of their noise.
        expected = equations(value, params, **options)
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", [EvoNormB0(False), EvoNormS0(num_groups=2)], ids=str)
def test_contract_of_signals(norm, x):
    x = jnp.float32(x)
    variables = norm.init(KEY, x)
    signal = Signal(x, KalmanState(0.0, 1.0))
    y, _ = norm.apply(variables, signal, mutable=["batch_stats"])
    assert y.state is None
    value, _ = norm.apply(variables, x, mutable=["batch_stats"])
    chex.assert_trees_all_equal(y.value, value)
    (apart, stream), _ = TwoSteps(norm).init_with_output(KEY, signal)
    chex.assert_trees_all_equal((apart, stream), (y, signal))


@pytest.mark.parametrize("cls", [EvoNormB0, EvoNormS0])
def test_dtype_of_half_precision(cls, x):
    norm = cls(
        False, dtype=jnp.bfloat16, **({"num_groups": 2} if cls is EvoNormS0 else {})
    )
    y, variables = norm.init_with_output(KEY, jnp.bfloat16(x))
    assert y.dtype == jnp.bfloat16
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
    expected, _ = norm.clone(dtype=None).init_with_output(KEY, jnp.bfloat16(x))
    assert expected.dtype == jnp.float32
    chex.assert_trees_all_equal(y, jnp.bfloat16(expected))


def test_group_counts_that_do_not_fit_are_refused(x):
    with pytest.raises(ValueError, match=r"num_groups is 0.*whole number"):
        EvoNormS0(num_groups=0)
    with pytest.raises(ValueError, match=r"num_groups is 32.* 4 channels.*divisor"):
        EvoNormS0().init(KEY, jnp.float32(x))
