"""Weight normalisation against its equation, and in the network."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal
from kalman_flax.baselines.weight_norm import Bias, weight_norm_conv

KEY = jax.random.key(0)
STATE = KalmanState(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 0.3, 2.0]))
GEOMETRY = {"strides": 2, "use_bias": False}


def inputs():
    return np.random.default_rng(0).normal(size=(2, 5, 5, 3))


def trained(variables):
    """Variables with v and g as far from the initial ones as training takes them."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten(
        [v + jax.random.normal(k, v.shape) for k, v in zip(keys, leaves)]
    )


def parts(variables):
    params = variables["params"]
    v = np.float64(params["layer_instance"]["kernel"])
    return v, np.float64(params["layer_instance/kernel/scale"])


def effective_kernel(v, g):
    return g * v / np.sqrt(np.sum(v**2, axis=(0, 1, 2)))


def correlate(x, kernel, stride):
    """VALID cross-correlation in float64, window by window."""
    h, w = kernel.shape[:2]
    rows, columns = ((x.shape[i + 1] - (h, w)[i]) // stride + 1 for i in (0, 1))
    return np.stack([
        np.stack([
            np.einsum(
                "nhwc,hwcd->nd",
                x[:, i * stride : i * stride + h, j * stride : j * stride + w],
                kernel,
            )
            for j in range(columns)
        ], axis=1)
        for i in range(rows)
    ], axis=1)  # fmt: skip


def test_value_gradient_and_state_are_those_of_the_effective_kernel():
    conv = weight_norm_conv(4, (3, 3), padding="VALID", **GEOMETRY)
    x = inputs()
    variables = trained(conv.init(KEY, x))
    v, g = parts(variables)
    w = effective_kernel(v, g)
    out = conv.apply(variables, Signal(jnp.asarray(x, jnp.float32), STATE))
    expected = correlate(x, w, 2)
    np.testing.assert_allclose(out.value, expected, rtol=1e-4, atol=1e-5)
    # Without padding a window's moments are sums over the kernel.
    mean = np.einsum("c,hwcd->d", np.float64(STATE.mean), w)
    var = np.einsum("c,hwcd->d", np.float64(STATE.var), w**2)
    np.testing.assert_allclose(out.state.mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.state.var, var, rtol=1e-4)

    def loss(params):
        return jnp.sum(jnp.sin(conv.apply({"params": params}, jnp.float32(x))))

    grads = parts({"params": jax.grad(loss)(variables["params"])})
    # Eq. 3 of the paper, from the gradient of w: that of v is orthogonal to v.
    patches = np.stack([
        x[:, i : i + 3, j : j + 3] for i in (0, 2) for j in (0, 2)
    ], axis=1)  # fmt: skip
    cos = np.cos(expected).reshape(2, 4, -1)
    grad_w = np.einsum("nphwc,npd->hwcd", patches, cos)
    norm = np.sqrt(np.sum(v**2, axis=(0, 1, 2)))
    grad_g = np.sum(grad_w * v, axis=(0, 1, 2)) / norm
    grad_v = g / norm * grad_w - g * grad_g / norm**2 * v
    np.testing.assert_allclose(grads[0], grad_v, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(grads[1], grad_g, rtol=1e-3, atol=1e-4)


def test_initial_function_is_that_of_kernels_of_length_g():
    x = inputs()
    he = jax.nn.initializers.he_normal()
    for g in (0.5, np.sqrt(2.0)):
        conv = weight_norm_conv(
            4, (3, 3), scale_init=jax.nn.initializers.constant(g), kernel_init=he
        )
        variables = conv.init(KEY, x)
        v, scale = parts(variables)
        np.testing.assert_allclose(scale, g, rtol=1e-6)
        # Flax stores v at the length of g: the convolution starts as that of v.
        y = conv.apply(variables, x)
        params = {"kernel": v, "bias": np.zeros(4)}
        expected = kf.Conv(4, (3, 3)).apply({"params": params}, x)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_torch_weight_norm():
    torch = pytest.importorskip("torch")
    conv = weight_norm_conv(4, (3, 3), padding=0, strides=2)
    x = inputs()
    variables = trained(conv.init(KEY, x))
    v, g = parts(variables)
    theirs = torch.nn.utils.parametrizations.weight_norm(
        torch.nn.Conv2d(3, 4, 3, stride=2, dtype=torch.float64)
    )
    weight = theirs.parametrizations.weight
    with torch.no_grad():
        weight.original0.copy_(torch.tensor(g).reshape(4, 1, 1, 1))
        weight.original1.copy_(torch.tensor(np.transpose(v, (3, 2, 0, 1))))
        bias = np.float64(variables["params"]["layer_instance"]["bias"])
        theirs.bias.copy_(torch.tensor(bias))
        expected = theirs(torch.tensor(np.moveaxis(x, -1, 1))).numpy()
    y = np.moveaxis(conv.apply(variables, x), -1, 1)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_bias_moves_value_and_state():
    x = jnp.asarray(inputs(), jnp.float32)
    norm = Bias(use_running_average=False)
    variables = trained(norm.init(KEY, x))
    assert jax.tree.map(jnp.shape, variables) == {"params": {"bias": (3,)}}
    bias = variables["params"]["bias"]
    y = norm.apply(variables, Signal(x, STATE))
    np.testing.assert_allclose(y.value, x + bias)
    np.testing.assert_allclose(y.state.mean, STATE.mean + bias)
    np.testing.assert_allclose(y.state.var, STATE.var)
    assert norm.apply(variables, Signal(x)).state is None
    np.testing.assert_allclose(norm.apply(variables, x), y.value)
    half = Bias(dtype=jnp.bfloat16).apply(variables, x)
    assert half.dtype == jnp.bfloat16
    assert Bias().apply(variables, x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_a_residual_block_adds_little_variance_at_first():
    conv = weight_norm_conv(32, (3, 3), padding="VALID", use_bias=False)

    @jax.vmap
    def branch(key):
        keys = jax.random.split(key, 3)
        y = jax.random.normal(keys[0], (1, 6, 6, 32))
        for kernel_key in keys[1:]:
            y, _ = conv.init_with_output(kernel_key, jax.nn.relu(y))
        return jnp.mean(y**2)

    # Two ReLUs halve the second moment of 1, two kernels of length 1/2 quarter it.
    second_moments = jax.jit(branch)(jax.random.split(KEY, 64))
    np.testing.assert_allclose(np.mean(second_moments), 0.5**4 / 4, rtol=0.15)


@pytest.mark.parametrize("scan", [False, True])
def test_in_the_network(scan):
    network = kf.models.ResNet(
        10, 2, 4, norm=Bias, conv=weight_norm_conv, scan=scan, dtype=jnp.bfloat16
    )
    images = jax.random.normal(jax.random.key(2), (2, 8, 8, 3))
    init = jax.jit(functools.partial(network.init, use_running_average=False))
    variables = init(KEY, images)
    assert set(variables) == {"params"}
    stem = variables["params"]["stem"]
    assert set(stem) == {"layer_instance", "layer_instance/kernel/scale"}
    y = jax.jit(functools.partial(network.apply, use_running_average=True))(
        variables, images
    )
    assert np.all(np.isfinite(y))


def test_vanished_kernels_have_finite_gradients():
    conv = weight_norm_conv(4, (3, 3))
    x = jnp.asarray(inputs(), jnp.float32)
    params = jax.tree.map(jnp.zeros_like, conv.init(KEY, x)["params"])
    grads = jax.grad(lambda p: jnp.sum(conv.apply({"params": p}, x)))(params)
    chex.assert_tree_all_finite(grads)
