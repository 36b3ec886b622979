"""FRN with TLU, against its equations in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kalman_flax import KalmanState, Signal
from kalman_flax.baselines.filter_response_norm import FilterResponseNorm
from tests.reference.checks import (
    DEGENERATE,
    TwoSteps,
    assert_finite,
    directional,
    each_degenerate,
)

KEY = jax.random.key(0)
PARAMS = {
    "scale": np.array([0.5, -1.0, 2.0]),
    "bias": np.array([0.3, 0.0, -0.2]),
    "threshold": np.array([-0.5, 0.1, 0.4]),
}
MASK = np.arange(12).reshape(1, 3, 4, 1) % 3 > 0


@pytest.fixture
def x():
    return 1 + 2 * np.random.default_rng(0).normal(size=(2, 3, 4, 3))


def reference(x, params, epsilon=1e-6, mask=None):
    x = np.asarray(x, np.float64)
    mask = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    y = np.empty_like(x)
    for n, c in np.ndindex(x.shape[0], x.shape[-1]):
        one = x[n, ..., c]
        nu2 = np.mean(one[mask[n, ..., c]] ** 2)
        y[n, ..., c] = one / np.sqrt(nu2 + epsilon)
    y = params.get("scale", 1.0) * y + params.get("bias", 0.0)
    return np.maximum(y, params["threshold"])


CASES = {
    "plain": ({}, PARAMS, None),
    "mask": ({}, PARAMS, MASK),
    "bare": (
        {"use_scale": False, "use_bias": False},
        {"threshold": PARAMS["threshold"]},
        None,
    ),
    "large epsilon": ({"epsilon": 0.5}, PARAMS, None),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, x):
    options, params, mask = CASES[case]
    norm = FilterResponseNorm(**options)
    shapes = jax.tree.map(jnp.shape, norm.init(KEY, jnp.float32(x)))
    assert shapes == {"params": jax.tree.map(np.shape, params)}

    def ours(x, params):
        return norm.apply({"params": params}, x, mask=mask)

    def theirs(x, params):
        return reference(x, params, options.get("epsilon", 1e-6), mask)

    single = jax.tree.map(jnp.float32, (x, params))
    np.testing.assert_allclose(ours(*single), theirs(x, params), rtol=1e-5, atol=1e-6)
    actual, expected = directional(ours, theirs, (x, params))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_initial_values_are_those_of_the_paper(x):
    params = FilterResponseNorm().init(KEY, jnp.float32(x))["params"]
    expected = {"scale": np.ones(3), "bias": np.zeros(3), "threshold": np.zeros(3)}
    chex.assert_trees_all_close(params, expected)


@each_degenerate
def test_degenerate_inputs(case):
    value = DEGENERATE[case]
    norm = FilterResponseNorm(dtype=value.dtype)
    y = assert_finite(norm, value)
    assert y.dtype == value.dtype
    if value.dtype == jnp.float32:
        expected = reference(value, {"threshold": 0.0})
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", [True, False, None])
def test_contract_of_signals(mode, x):
    x = jnp.float32(x)
    norm = FilterResponseNorm(use_running_average=mode)
    variables = norm.init(KEY, x)
    signal = Signal(x, KalmanState(0.0, 1.0))
    y = norm.apply(variables, signal)
    assert y.state is None
    chex.assert_trees_all_equal(y.value, norm.apply(variables, x))
    (apart, stream), _ = TwoSteps(norm).init_with_output(KEY, signal)
    chex.assert_trees_all_equal((apart, stream), (y, signal))


def test_dtype_is_that_of_batch_norm(x):
    half = jnp.bfloat16(x)
    assert FilterResponseNorm().init_with_output(KEY, half)[0].dtype == jnp.float32
    norm = FilterResponseNorm(dtype=jnp.bfloat16)
    y, variables = norm.init_with_output(KEY, half)
    assert y.dtype == jnp.bfloat16
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)


@pytest.mark.parametrize("epsilon", [0.0, -1e-6, float("nan")])
def test_bad_epsilon_is_refused(epsilon):
    with pytest.raises(ValueError, match=r"epsilon is .*expected"):
        FilterResponseNorm(epsilon=epsilon)
