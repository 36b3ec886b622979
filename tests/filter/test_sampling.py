import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import kalman_flax as kf
from tests.reference import kalman as reference
from tests.reference.statistics import assert_mean

GEOMETRIES = {
    "SAME": {},
    "strided": {"strides": (2, 2)},
    "dilated-VALID": {"kernel_dilation": (2, 1), "padding": "VALID"},
    "grouped": {"feature_group_count": 2},
    "zeros-between": {"input_dilation": 2, "padding": 1},
}


def draw(channels=4, features=6, taps=(), groups=1):
    rng = np.random.default_rng(0)
    kernel = rng.normal(0.2, 0.5, (*taps, channels // groups, features))
    mean, var = rng.normal(size=channels), rng.uniform(0.2, 2, channels)
    bias = rng.normal(size=features)
    return [np.float32(a) for a in (mean, var, kernel, bias)]


def assert_converges(estimate, expected):
    """Estimates of 2000 keys against ``(mean, var)``.

    One estimate's variance misses that of its own mean, so that is added.
    """
    mean, var = jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(0), 2000))
    assert_mean(mean, expected[0])
    around = np.square(np.asarray(mean, np.float64) - expected[0])
    assert_mean(var + around, expected[1])


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_conv_converges_to_the_closed_form(geometry):
    groups = geometry.get("feature_group_count", 1)
    mean, var, kernel, bias = draw(taps=(3, 3), groups=groups)
    arguments = {"bias": bias, **geometry}

    def estimate(key):
        state = kf.KalmanState(mean, var)
        return kf.filter.sample_conv(key, state, kernel, (8, 7), **arguments)

    assert_converges(estimate, reference.conv(mean, var, kernel, (8, 7), **arguments))


def test_dense_converges_to_the_closed_form():
    mean, var, kernel, bias = draw()

    def estimate(key):
        state = kf.KalmanState(mean, var)
        return kf.filter.sample_dense(key, state, kernel, bias, num_samples=64)

    assert_converges(estimate, reference.dense(mean, var, kernel, bias))


@pytest.mark.parametrize("taps", [(), (2, 3)], ids=["dense", "conv"])
def test_gradients_flow_to_state_and_kernel(taps):
    mean, var, kernel, bias = draw(features=2, taps=taps)

    @jax.jit
    def loss(mean, var, kernel, bias):
        key, state = jax.random.key(0), kf.KalmanState(mean, var)
        if taps:
            state = kf.filter.sample_conv(key, state, kernel, (6, 7), bias=bias)
        else:
            state = kf.filter.sample_dense(key, state, kernel, bias)
        return jnp.sum(jnp.sin(state.mean) + jnp.log(state.var))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    grads = gradient(mean, var, kernel, bias)
    assert all(np.all(g != 0) for g in grads)
    check_grads(
        loss,
        (mean, var, kernel, bias),
        order=1,
        modes=["rev"],
        atol=1e-2,
        rtol=1e-2,
        eps=3e-3,
    )
    chex.assert_tree_all_finite(gradient(mean, 0 * var, kernel, bias))


@pytest.mark.parametrize("taps", [(), (3, 3)])
def test_one_state_at_a_time(taps):
    """As many examples as columns would be taken for them."""
    *_, kernel, _ = draw(taps=taps)
    state = kf.KalmanState(jnp.zeros((5, 4)), jnp.ones((5, 4)))
    with pytest.raises(ValueError, match=r"shape \(5, 4\); expected one state \[C\]"):
        if taps:
            kf.filter.sample_conv(jax.random.key(0), state, kernel, (5, 5))
        else:
            kf.filter.sample_dense(jax.random.key(0), state, kernel, num_samples=5)


@pytest.mark.parametrize("taps", [(), (3, 3)])
def test_another_number_of_channels(taps):
    *_, kernel, _ = draw(taps=taps)
    state = kf.KalmanState(jnp.zeros(3), jnp.ones(3))
    with pytest.raises(ValueError, match=r"shape \(3,\).* 4 channels"):
        if taps:
            kf.filter.sample_conv(jax.random.key(0), state, kernel, (5, 5))
        else:
            kf.filter.sample_dense(jax.random.key(0), state, kernel)
