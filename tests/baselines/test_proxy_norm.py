"""Proxy normalization against its equations in float64."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal
from kalman_flax.baselines.proxy_norm import ProxyNorm
from tests.reference.checks import (
    DEGENERATE,
    TwoSteps,
    assert_finite,
    directional,
    each_degenerate,
)

KEY = jax.random.key(0)
PARAMS = {
    "scale": np.array([0.5, -1.0, 2.0, 1.5]),
    "bias": np.array([0.3, 0.0, -0.2, 0.1]),
    "proxy_scale": np.array([0.2, 0.0, -0.5, 0.1]),
    "proxy_bias": np.array([0.0, 0.4, -0.3, 1.0]),
}
MASK = np.arange(12).reshape(1, 3, 4, 1) % 3 > 0
#: Nodes and weights of an integral over a Gaussian by the trapezoidal rule, fine enough
#: for a kink.
Z = np.linspace(-9.0, 9.0, 200_001)
WEIGHTS = np.exp(-(Z**2) / 2) / np.exp(-(Z**2) / 2).sum()


@pytest.fixture
def x():
    return 1 + 2 * np.random.default_rng(0).normal(size=(2, 3, 4, 4))


def single(tree):
    return jax.tree.map(jnp.float32, tree)


def relu(x):
    return np.maximum(x, 0)


def silu(x):
    return x / (1 + np.exp(-x))


def equations(x, params, groups, phi=relu, epsilon=1e-5, proxy_epsilon=0.03, mask=None):
    """Channel by channel, with the proxy's moments as integrals over z."""
    where = np.broadcast_to(True if mask is None else mask, x.shape)
    size = x.shape[-1] // groups
    y = np.empty(x.shape)
    for n, c in np.ndindex(len(x), x.shape[-1]):
        group = n, ..., slice(c // size * size, (c // size + 1) * size)
        kept = np.float64(x[group])[where[group]]
        normal = (np.float64(x[n, ..., c]) - kept.mean()) / np.sqrt(
            kept.var() + epsilon
        )
        p = {name: values[c] for name, values in params.items()}
        proxy = (1 + p["proxy_scale"]) * Z + p["proxy_bias"]
        scale, bias = p.get("scale", 1.0), p.get("bias", 0.0)
        activated = phi(scale * proxy + bias)
        mean = np.sum(WEIGHTS * activated)
        var = np.sum(WEIGHTS * (activated - mean) ** 2)
        y[n, ..., c] = phi(scale * normal + bias) - mean
        y[n, ..., c] /= np.sqrt(var + proxy_epsilon)
    return y


BARE = {name: PARAMS[name] for name in ("proxy_scale", "proxy_bias")}
CASES = {
    "groups": (ProxyNorm(num_groups=2), PARAMS, {"groups": 2}),
    "layer": (ProxyNorm(num_groups=1), PARAMS, {"groups": 1}),
    "mask": (ProxyNorm(num_groups=2), PARAMS, {"groups": 2, "mask": MASK}),
    "bare": (
        ProxyNorm(num_groups=4, use_scale=False, use_bias=False), BARE, {"groups": 4},
    ),
    "epsilon": (
        ProxyNorm(num_groups=2, epsilon=0.5, proxy_epsilon=0.2), PARAMS,
        {"groups": 2, "epsilon": 0.5, "proxy_epsilon": 0.2},
    ),
    "silu": (
        ProxyNorm(num_groups=2, activation=kf.activation(nn.silu)), PARAMS,
        {"groups": 2, "phi": silu},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, x):
    norm, params, options = CASES[case]
    variables = norm.init(KEY, single(x))
    assert set(variables) == {"params"}
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes == jax.tree.map(np.shape, params)

    def ours(x, params):
        return norm.apply({"params": params}, x, mask=options.get("mask"))

    def theirs(x, params):
        return equations(x, params, **options)

    y = ours(*single((x, params)))
    np.testing.assert_allclose(y, theirs(x, params), rtol=1e-3, atol=1e-4)
    actual, expected = directional(ours, theirs, (x, params), step=1e-4)
    np.testing.assert_allclose(actual, expected, rtol=3e-3, atol=1e-3)


def test_channels_have_mean_0_and_variance_1_where_the_proxy_is_right():
    """Gaussian maps, whatever scale and bias."""
    x = jax.random.normal(KEY, (2, 256, 256, 4))
    params = PARAMS | {"proxy_scale": np.zeros(4), "proxy_bias": np.zeros(4)}
    norm = ProxyNorm(num_groups=1, proxy_epsilon=1e-6)
    y = norm.apply({"params": single(params)}, x)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0.0, atol=0.02)
    np.testing.assert_allclose(y.var((0, 1, 2)), 1.0, rtol=0.03)


def test_initial_values_are_those_of_the_official_code(x):
    params = ProxyNorm(num_groups=2).init(KEY, single(x))["params"]
    expected = {"scale": 1.0, "bias": 0.0, "proxy_scale": 0.0, "proxy_bias": 0.0}
    assert jax.tree.map(lambda p: p.tolist(), params) == {
        name: [value] * 4 for name, value in expected.items()
    }


@each_degenerate
def test_degenerate_inputs(case):
    value = DEGENERATE[case]
    y = assert_finite(ProxyNorm(num_groups=2, dtype=value.dtype), value)
    assert y.dtype == value.dtype
    if value.dtype == jnp.float32:
        params = {name: np.zeros(4) for name in BARE}
        expected = equations(value, params, groups=2)
        # At 1e4 float32 itself is 1e-3 coarse, and so is the mean.
        atol = 1e-2 if case == "large" else 1e-4
        np.testing.assert_allclose(y, expected, rtol=1e-3, atol=atol)


def test_a_channel_without_a_proxy_has_finite_gradients(x):
    """proxy_scale -1, or scale 0: the proxy has no variance."""
    norm = ProxyNorm(num_groups=2)
    for name, value in (("proxy_scale", -1.0), ("scale", 0.0)):
        params = single(PARAMS | {name: np.full(4, value)})
        grads = jax.grad(lambda p: jnp.sum(jnp.sin(norm.apply({"params": p}, x))))(
            params
        )
        chex.assert_tree_all_finite(grads)


def test_contract_of_signals(x):
    norm = ProxyNorm(num_groups=2)
    x = single(x)
    variables = norm.init(KEY, x)
    signal = Signal(x, KalmanState(0.0, 1.0))
    y = norm.apply(variables, signal)
    assert y.state is None
    chex.assert_trees_all_equal(y.value, norm.apply(variables, x))
    chex.assert_trees_all_equal(y.value, norm.apply(variables, x, True))
    (apart, stream), _ = TwoSteps(norm).init_with_output(KEY, signal)
    chex.assert_trees_all_equal((apart, stream), (y, signal))


def test_one_image_does_not_see_another(x):
    norm = ProxyNorm(num_groups=2)
    y, variables = norm.init_with_output(KEY, single(x))
    alone = norm.apply(variables, single(x[:1]))
    chex.assert_trees_all_close(y[:1], alone, rtol=1e-6)


@pytest.mark.parametrize("num_groups", [3, 0, -2])
def test_group_counts_that_do_not_fit_are_refused(x, num_groups):
    with pytest.raises(ValueError, match=rf"num_groups is {num_groups}[,;]"):
        ProxyNorm(num_groups=num_groups).init(KEY, single(x))
