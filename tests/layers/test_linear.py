"""Conv and Dense: values and parameters of Flax, states of the pure functions."""

import inspect

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal
from tests.reference.statistics import assert_moments

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


# name: (kernel size, map, options)
TRANSPOSED = {
    "SAME": ((3, 2), (6, 5), {"strides": (2, 3)}),
    "VALID": ((2, 4), (5, 6), {"strides": (3, 2), "padding": "VALID"}),
    "stride 1": ((3, 4), (5, 6), {"kernel_dilation": (1, 2)}),
    "pairs": ((3, 3), (5, 6), {"strides": (2, 2), "padding": ((1, 2), (0, 1))}),
    "circular": ((3, 4), (5, 6), {"strides": (3, 1), "padding": "CIRCULAR"}),
    "transpose_kernel": ((3, 2), (6, 5), {"strides": (2, 2), "transpose_kernel": True}),
    "1-D": (4, (30,), {"strides": 3, "use_bias": False}),
}


@pytest.mark.parametrize(
    ("window", "size", "options"), TRANSPOSED.values(), ids=TRANSPOSED
)
def test_transposed_convolution_is_flax_and_predicts(window, size, options):
    ours, theirs = (
        cls(5, window, **options) for cls in (kf.ConvTranspose, nn.ConvTranspose)
    )
    x = jax.random.normal(KEY, (4_000, *size, 4))
    variables = theirs.init(KEY, x[:1])
    chex.assert_trees_all_equal(ours.init(KEY, Signal(x[:1], STATE)), variables)
    variables = randomized(variables)
    y = theirs.apply(variables, STATE.mean + jnp.sqrt(STATE.var) * x)
    np.testing.assert_array_equal(
        ours.apply(variables, x[:1]), theirs.apply(variables, x[:1])
    )
    assert_moments(y, *ours.apply(variables, Signal(x[:1], STATE)).state)


@pytest.mark.parametrize("transpose_kernel", [True, False])
def test_a_kernel_map_of_a_transposed_convolution(transpose_kernel, x):
    options = {"transpose_kernel": transpose_kernel, "kernel_map": kf.centre_kernel}
    conv = kf.ConvTranspose(6, (3, 3), use_bias=False, **options)
    variables = conv.init(KEY, x)
    inside = conv.apply(variables, jnp.ones_like(x))[:, 1:-1, 1:-1]
    np.testing.assert_allclose(inside, jnp.zeros_like(inside), atol=1e-5)
    kernel = conv.bind(variables).used_kernel()
    assert kernel.shape[-2:] == ((6, 4) if transpose_kernel else (4, 6))


@pytest.mark.parametrize(
    ("window", "shape"),
    [(3, (2, 9, 4)), ((3, 2, 3), (2, 4, 5, 3, 4))],
    ids=["1-D", "3-D"],
)
def test_conv_of_other_dimensions(window, shape):
    x = Signal(jax.random.normal(KEY, shape), STATE)
    ours, theirs = (cls(6, window, strides=2) for cls in (kf.Conv, nn.Conv))
    variables = theirs.init(KEY, x.value)
    out = ours.apply(variables, x)
    np.testing.assert_array_equal(out.value, theirs.apply(variables, x.value))
    expected = kf.filter.predict_conv(
        STATE, variables["params"]["kernel"], shape[1:-1], strides=2
    )
    chex.assert_trees_all_close(out.state, expected)


@pytest.mark.parametrize("cls", [kf.Conv, kf.ConvTranspose])
def test_a_mask_is_of_the_kernel_that_predicts(cls, x):
    mask = np.random.default_rng(0).integers(0, 2, (3, 3, 4, 5))
    conv, bare = cls(5, (3, 3), mask=mask), cls(5, (3, 3))
    variables = randomized(conv.init(KEY, x))
    params = variables["params"]
    masked = {"params": {**params, "kernel": params["kernel"] * mask}}
    chex.assert_trees_all_close(
        conv.apply(variables, Signal(x, STATE)), bare.apply(masked, Signal(x, STATE))
    )


@pytest.mark.parametrize(
    "name", ["Conv", "ConvTranspose", "Dense", "Dropout", "avg_pool", "max_pool"]
)
def test_arguments_are_those_of_flax(name):
    """In its order, with its defaults; ours come last."""
    ours, theirs = (
        list(inspect.signature(getattr(lib, name)).parameters.values())
        for lib in (kf, nn)
    )
    own = [p for p in ours if p.name in ("kernel_map", "transition")]
    assert own == [p for p in ours if p.name not in {q.name for q in theirs}]

    def arguments(parameters):
        return [
            (p.name, p.kind, p.default)
            for p in parameters
            if p not in own and p.name not in ("parent", "name")
        ]

    assert arguments(ours) == arguments(theirs)
    positions = [i for i, p in enumerate(ours) if p.name not in ("parent", "name")]
    assert [ours[i] for i in positions[len(positions) - len(own) :]] == own
    call = getattr(kf, name), getattr(nn, name)
    if inspect.isclass(call[0]):
        ours, theirs = (list(inspect.signature(c.__call__).parameters) for c in call)
        assert ours == theirs


def test_an_export_of_symbolic_height_and_width():
    """In inference nobody needs the state, which could not be computed."""
    network = kf.models.ResNet(num_classes=3, blocks_per_stage=1, width=4)
    variables = network.init(KEY, jnp.zeros((1, 8, 8, 3)), True)
    sizes = jax.export.symbolic_shape("4*h, 4*w")
    exported = jax.export.export(jax.jit(lambda x: network.apply(variables, x, True)))(
        jax.ShapeDtypeStruct((2, *sizes, 3), jnp.float32)
    )
    images = jax.random.normal(KEY, (2, 8, 12, 3))
    np.testing.assert_allclose(
        exported.call(images),
        network.apply(variables, images, True),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("use_bias", [True, False])
def test_arrays_of_different_ranks_never_meet(use_bias):
    """As `jax_numpy_rank_promotion` can demand."""
    with jax.numpy_rank_promotion("raise"):
        for x, layer in (
            (jnp.ones((2, 4, 4, 4)), kf.Conv(3, (3, 3), use_bias=use_bias)),
            (jnp.ones((2, 4, 4, 4)), kf.ConvTranspose(3, (3, 3), use_bias=use_bias)),
            (jnp.ones((2, 4, 4, 4)), kf.Dense(3, use_bias=use_bias)),
        ):
            of_examples = jax.tree.map(lambda s: jnp.stack([s, s]), STATE)
            for state in STATE, of_examples:
                layer.init_with_output(KEY, Signal(x, state))


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
