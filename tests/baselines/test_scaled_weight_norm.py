"""Scaled weight standardisation against its equation, and the clipping made for it."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal
from kalman_flax.baselines.scaled_weight_norm import (
    ScaledStandardization,
    scaled,
    scaled_relu,
    scaled_weight_conv,
)
from tests.reference.checks import directional

KEY = jax.random.key(0)
KERNEL = 0.3 + np.random.default_rng(0).normal(size=(3, 3, 2, 4))
GAIN = np.array([0.5, 1.0, 2.0, -1.0])


def equation(kernel, gain, epsilon=1e-4):
    """One output feature after the other."""
    result = np.empty_like(kernel)
    for d in range(kernel.shape[-1]):
        w = kernel[..., d]
        power = max(w.size * w.var(), epsilon)
        result[..., d] = gain[d] * (w - w.mean()) / np.sqrt(power)
    return result


def ours(kernel, gain, **options):
    params = {"params": {"gain": gain}}
    return ScaledStandardization(**options).apply(params, kernel)


@pytest.mark.parametrize("epsilon", [1e-4, 100.0])
def test_values_and_gradients(epsilon):
    """Above epsilon, and below."""
    assert 1.0 < KERNEL[..., 0].size * KERNEL[..., 0].var() < 100.0
    arguments = KERNEL, GAIN
    values = ours(*map(jnp.float32, arguments), epsilon=epsilon)
    expected = equation(*arguments, epsilon)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)
    actual, expected = directional(
        lambda *a: ours(*a, epsilon=epsilon),
        lambda *a: equation(*a, epsilon),
        arguments,
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-3)


@pytest.mark.parametrize("kernel", [np.zeros((3, 3, 2, 4)), np.ones((1, 1, 1, 4))])
def test_kernels_without_spread_give_0_and_finite_gradients(kernel):
    kernel = jnp.float32(kernel)
    assert not np.any(ours(kernel, jnp.float32(GAIN)))
    grads = jax.grad(lambda *a: jnp.sum(jnp.sin(ours(*a))), (0, 1))(
        kernel, jnp.float32(GAIN)
    )
    chex.assert_tree_all_finite(grads)


def test_convolution_is_that_of_the_standardized_kernel():
    conv = scaled_weight_conv(4, (3, 3), strides=2, use_bias=False)
    state = KalmanState(jnp.array([0.5, -1.0]), jnp.array([1.0, 0.3]))
    x = Signal(jax.random.normal(KEY, (2, 5, 5, 2)), state)
    variables = conv.init(KEY, x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "kernel": (3, 3, 2, 4),
        "kernel_map": {"gain": (4,)},
    }
    assert np.all(variables["params"]["kernel_map"]["gain"] == 1.0)
    params = {"kernel": jnp.float32(KERNEL), "kernel_map": {"gain": jnp.float32(GAIN)}}
    y = conv.apply({"params": params}, x)
    plain = kf.Conv(4, (3, 3), strides=2, use_bias=False)
    params = {"kernel": jnp.float32(equation(KERNEL, GAIN))}
    chex.assert_trees_all_close(
        y, plain.apply({"params": params}, x), rtol=1e-4, atol=1e-5
    )


def test_every_convolution_has_a_gain_of_its_own():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = scaled_weight_conv(2, (1, 1))(x)
            return scaled_weight_conv(3, (1, 1))(x)

    params = Two().init(KEY, jnp.ones((1, 2, 2, 1)))["params"]
    gains = [params[name]["kernel_map"]["gain"].shape for name in ("Conv_0", "Conv_1")]
    assert gains == [(2,), (3,)]


def test_kernel_map_is_taken():
    with pytest.raises(ValueError, match="leave kernel_map out"):
        scaled_weight_conv(4, (3, 3), kernel_map=kf.centre_kernel)


def test_scaled_relu_has_variance_1():
    x = jax.random.normal(KEY, (1_000_000,))
    y = scaled_relu(Signal(x[:, None], KalmanState(0.0, 1.0)))
    np.testing.assert_allclose(np.var(np.float64(y.value)), 1.0, rtol=5e-3)
    np.testing.assert_allclose(y.state.var, 1.0, rtol=1e-5)
    np.testing.assert_allclose(y.state.mean, np.mean(np.float64(y.value)), rtol=5e-3)
    chex.assert_trees_all_equal(scaled_relu(x), y.value[:, 0])


def test_scaled_keeps_the_dtype():
    x = Signal(jnp.full((1, 2), 3.0, jnp.bfloat16), KalmanState(1.0, 2.0))
    y = scaled(x, jnp.float32(0.5))
    assert y.value.dtype == jnp.bfloat16 and y.value[0, 0] == 1.5
    chex.assert_trees_all_close(
        y.state, KalmanState(jnp.full(2, 0.5), jnp.full(2, 0.5))
    )


def agc(params, grads, clipping, eps=1e-3):
    """Brock et al. (2021), section 4: unit by unit, the unit an output feature."""

    def clip(w, g):
        units = w.shape[-1] if np.ndim(w) > 1 else 1  # vectors are one unit
        shape, result = w.shape, []
        for row, step in zip(w.reshape(-1, units).T, g.reshape(-1, units).T):
            largest = clipping * max(np.sqrt(np.sum(row**2)), eps)
            result.append(step * min(1.0, largest / np.sqrt(np.sum(step**2))))
        return np.stack(result, axis=-1).reshape(shape)

    return jax.tree.map(clip, params, grads)


def test_adaptive_clipping_of_optax_is_by_output_feature():
    """Kernels are ``[h, w, C, features]`` and ``[C, features]`` here as in optax."""
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 2, 4), "dense": (6, 5), "bias": (4,), "skip_gain": ()}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    params["skip_gain"] = np.zeros(())
    params["conv"][..., 1] = 0.0
    grads = {name: 0.3 * rng.normal(size=shape) for name, shape in shapes.items()}
    grads["skip_gain"] = np.array(0.3)
    grads["conv"][..., 2] *= 1e-3  # short enough to stay as it is
    expected = agc(params, grads, 0.1)
    assert np.all(expected["conv"][..., 2] == grads["conv"][..., 2])
    assert np.all(np.abs(expected["conv"][..., 0]) < np.abs(grads["conv"][..., 0]))

    single = jax.tree.map(jnp.float32, (params, grads))
    transform = optax.adaptive_grad_clip(0.1)
    clipped, _ = transform.update(single[1], transform.init(single[0]), single[0])
    chex.assert_trees_all_close(clipped, expected, rtol=1e-4, atol=1e-9)
