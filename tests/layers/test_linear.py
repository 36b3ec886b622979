"""Conv and Dense: values and parameters of Flax, states of the pure functions."""

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal

KEY = jax.random.key(0)
STATE = KalmanState(jnp.array([-1.0, 0.0, 2.0, 1.0]), jnp.array([0.5, 1.0, 4.0, 0.0]))
GEOMETRIES = {
    "default": {},
    "no bias": {"use_bias": False},
    "strides": {"strides": (2, 1)},
    "stride": {"strides": 2},
    "valid": {"padding": "VALID"},
    "pairs": {"padding": ((2, 0), (1, 3)), "strides": 2},
    "dilation": {"kernel_dilation": (2, 1)},
    "none": {"strides": None, "kernel_dilation": None, "padding": "valid"},
    "groups": {"feature_group_count": 2},
    "all": {"strides": 2, "padding": ((0, 2), (2, 1)), "kernel_dilation": 2,
            "feature_group_count": 4},
}  # fmt: skip


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (2, 7, 6, 4))


def randomized(variables, key=KEY):
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(key, len(leaves))
    leaves = [jax.random.normal(k, v.shape, v.dtype) for k, v in zip(keys, leaves)]
    return tree.unflatten(leaves)


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
def test_conv_is_flax_conv(options, x):
    ours, theirs = (cls(8, (3, 2), **options) for cls in (kf.Conv, nn.Conv))
    variables = theirs.init(KEY, x)
    chex.assert_trees_all_equal(ours.init(KEY, Signal(x, STATE)), variables)
    variables = randomized(variables)
    expected = theirs.apply(variables, x)
    out = ours.apply(variables, Signal(x, STATE))
    np.testing.assert_allclose(out.value, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.apply(variables, x), out.value)


@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
def test_conv_predicts_with_its_kernel_bias_and_geometry(options, x):
    conv = kf.Conv(8, (3, 2), **options)
    variables = randomized(conv.init(KEY, x))
    # Exact for independent inputs: draw many, and average over all positions.
    maps = jax.random.normal(jax.random.key(2), (10_000, 7, 6, 4))
    y = conv.apply(variables, STATE.mean + jnp.sqrt(STATE.var) * maps)
    mean, var = conv.apply(variables, Signal(x, STATE)).state
    scale = np.sqrt(var)
    np.testing.assert_allclose(mean / scale, y.mean((0, 1, 2)) / scale, atol=0.02)
    np.testing.assert_allclose(var, y.var((0, 1, 2)), rtol=0.03)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 3, 4)])
def test_dense_is_flax_dense_and_predicts(shape, use_bias):
    x = jax.random.normal(KEY, shape)
    ours, theirs = (cls(3, use_bias=use_bias) for cls in (kf.Dense, nn.Dense))
    variables = theirs.init(KEY, x)
    chex.assert_trees_all_equal(ours.init(KEY, Signal(x, STATE)), variables)
    variables = randomized(variables)
    out = ours.apply(variables, Signal(x, STATE))
    np.testing.assert_array_equal(out.value, theirs.apply(variables, x))
    kernel = variables["params"]["kernel"]
    bias = variables["params"].get("bias", 0.0)
    np.testing.assert_allclose(out.state.mean, STATE.mean @ kernel + bias, rtol=1e-5)
    np.testing.assert_allclose(out.state.var, STATE.var @ kernel**2, rtol=1e-5)


@pytest.mark.parametrize(
    "dtype, of_input", [("bfloat16", "float32"), (None, "bfloat16")]
)
@pytest.mark.parametrize("cls", ["Conv", "Dense"])
def test_half_precision_is_that_of_flax_and_states_stay_float32(
    cls, dtype, of_input, x
):
    args = (8, (3, 3)) if cls == "Conv" else (8,)
    ours, theirs = (getattr(lib, cls)(*args, dtype=dtype) for lib in (kf, nn))
    x = x.astype(of_input)
    variables = randomized(theirs.init(KEY, x))
    out, expected = ours.apply(variables, Signal(x, STATE)), theirs.apply(variables, x)
    assert out.value.dtype == expected.dtype
    np.testing.assert_allclose(
        np.float32(out.value), np.float32(expected), rtol=0.02, atol=0.05
    )
    chex.assert_type(list(out.state), jnp.float32)


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=["no batch axis", "two"])
def test_conv_takes_any_batch_axes(batch, x):
    x = jnp.broadcast_to(x[0], (*batch, *x.shape[1:]))
    ours, theirs = kf.Conv(8, (3, 3)), nn.Conv(8, (3, 3))
    variables = theirs.init(KEY, x)
    np.testing.assert_allclose(
        ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-5, atol=1e-5
    )


def numpy_standardized(kernel):
    kernel = np.asarray(kernel, np.float64)
    result = np.empty_like(kernel)
    for feature in range(kernel.shape[-1]):
        w = kernel[..., feature]
        result[..., feature] = (w - w.mean()) / (w.std() + 1e-5)
    return result.astype(np.float32)


@pytest.mark.parametrize("groups", [1, 2])
def test_weight_standardization(groups, x):
    options = {"features": 6, "kernel_size": (3, 3), "feature_group_count": groups}
    ours = kf.Conv(**options, kernel_map=kf.standardize_kernel)
    theirs = nn.Conv(**options)
    variables = randomized(theirs.init(KEY, x))
    chex.assert_trees_all_equal_shapes(ours.init(KEY, x), variables)
    out = ours.apply(variables, Signal(x, STATE))

    kernel = numpy_standardized(variables["params"]["kernel"])
    variables = {"params": {**variables["params"], "kernel": kernel}}
    expected = theirs.apply(variables, x)
    np.testing.assert_allclose(out.value, expected, rtol=1e-4, atol=1e-4)
    predicted = kf.Conv(**options).apply(variables, Signal(x, STATE)).state
    chex.assert_trees_all_close(out.state, predicted, rtol=1e-4, atol=1e-4)


def test_weight_standardization_reaches_the_gradient(x):
    """The loss does not change with the scale of a kernel that is standardised."""
    conv = kf.Conv(6, (3, 3), kernel_map=kf.standardize_kernel)
    params = randomized(conv.init(KEY, x))["params"]

    def loss(kernel):
        variables = {"params": {**params, "kernel": kernel}}
        return jnp.sum(jnp.sin(conv.apply(variables, x)))

    kernel = params["kernel"]
    grad = jax.grad(loss)(kernel)
    assert jnp.linalg.norm(grad) > 0.1
    along = jnp.sum(grad * kernel, axis=(0, 1, 2))
    np.testing.assert_allclose(along, np.zeros(6), atol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kernel", [np.ones((1, 1, 1, 2)), np.zeros((3, 3, 2, 2))])
def test_weight_standardization_of_kernels_without_spread(kernel, dtype):
    """Of 1x1 convolutions of one channel, and of kernels that start at zero."""

    def loss(kernel):
        return jnp.sum(jnp.sin(kf.standardize_kernel(kernel)))

    value, grad = jax.value_and_grad(loss)(jnp.asarray(kernel, dtype))
    assert value.dtype == dtype
    assert value == 0
    assert jnp.all(jnp.isfinite(grad))


@pytest.mark.parametrize("name", ["Conv", "Dense"])
def test_monte_carlo_transition_agrees_with_the_closed_form(name):
    args = (3, (3, 3)) if name == "Conv" else (3,)
    x = Signal(jnp.zeros((1, 24, 24, 4)), STATE)
    cls = getattr(kf, name)
    closed, sampled = cls(*args), cls(*args, transition="monte_carlo")
    variables = randomized(closed.init(KEY, x))
    assert jax.tree.structure(sampled.init(KEY, x)) == jax.tree.structure(variables)

    def draw(key):
        return sampled.apply(variables, x, rngs={"transition": key})

    out = jax.vmap(draw)(jax.random.split(jax.random.key(3), 64))
    expected = closed.apply(variables, x).state
    np.testing.assert_array_equal(out.value[0], closed.apply(variables, x).value)
    for estimate, exact in zip(out.state, expected):
        assert estimate.std(axis=0).min() > 1e-3  # every key draws anew
        error = np.abs(estimate.mean(axis=0) - exact) / np.sqrt(expected.var)
        np.testing.assert_array_less(error, 0.1)


@pytest.mark.parametrize("name", ["Conv", "Dense"])
def test_monte_carlo_transition_asks_for_its_rng(name, x):
    layer = kf.Conv(3, (3, 3), transition="monte_carlo")
    if name == "Dense":
        layer = kf.Dense(3, transition="monte_carlo")
    variables = layer.init(KEY, x)
    layer.apply(variables, x)  # nothing to sample without a state
    with pytest.raises(flax.errors.InvalidRngError, match="transition"):
        layer.apply(variables, Signal(x, STATE))


@pytest.mark.parametrize("layer", [
    kf.Conv(3, (3, 3), transition="exact"), kf.Dense(3, transition="exact"),
], ids=["Conv", "Dense"])  # fmt: skip
def test_unknown_transition_is_refused(layer, x):
    with pytest.raises(ValueError, match=r"'exact'.*closed_form.*monte_carlo"):
        layer.init(KEY, x)


def test_an_input_of_too_few_axes_is_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 4\).*with 2 axes of the map"):
        kf.Conv(3, (3, 3)).init(KEY, jnp.zeros((4, 4)))


def test_gradient_flows_through_the_transition(x):
    """The paper: A learns through the prediction too."""
    conv = kf.Conv(3, (3, 3))
    variables = conv.init(KEY, x)

    def predicted(variables, state):
        return sum(map(jnp.sum, conv.apply(variables, Signal(x, state)).state))

    grads = jax.grad(predicted, argnums=(0, 1))(variables, STATE)
    for grad in jax.tree.leaves(grads):
        assert jnp.all(jnp.isfinite(grad)) and jnp.any(grad != 0)
