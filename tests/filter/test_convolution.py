import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

import kalman_flax as kf
from tests.reference import kalman as reference
from tests.reference.statistics import assert_moments

CHANNELS, FEATURES = 4, 6
ARGUMENTS = (
    "strides",
    "padding",
    "input_dilation",
    "kernel_dilation",
    "feature_group_count",
)

# name: (kernel size, input size, geometry)
GEOMETRIES = {
    "3x3": ((3, 3), (8, 8), {}),
    "1x1-strided": ((1, 1), (8, 8), {"strides": (2, 2)}),
    "even-kernel": ((2, 4), (8, 8), {}),
    "non-square": ((5, 2), (3, 7), {}),
    "strided-SAME-is-lopsided": ((3, 3), (8, 8), {"strides": (2, 2)}),
    "strides-differ": ((3, 4), (7, 8), {"strides": (3, 2)}),
    "dilated": ((3, 3), (8, 8), {"kernel_dilation": (2, 3)}),
    "dilated-strided": ((2, 3), (9, 8), {"kernel_dilation": (3, 2), "strides": (2, 1)}),
    "grouped": ((3, 3), (8, 8), {"feature_group_count": 2}),
    "VALID": ((3, 2), (8, 7), {"padding": "VALID", "strides": (2, 1)}),
    "padded-by-hand": ((3, 3), (8, 6), {"padding": ((2, 0), (1, 3))}),
    "cropped-by-hand": ((3, 3), (8, 8), {"padding": ((-1, 2), (0, -2))}),
    "7x7-stem": ((7, 7), (8, 8), {"padding": ((3, 3), (3, 3)), "strides": (2, 2)}),
    "kernel-larger-than-map": ((5, 5), (2, 3), {}),
    "integers": ((3, 3), (7, 6), {"strides": 2, "padding": 1, "kernel_dilation": 2}),
    "1-D": ((5,), (60,), {"strides": (3,), "kernel_dilation": 2}),
    "1-D-causal": ((4,), (60,), {"padding": "CAUSAL", "kernel_dilation": (3,)}),
    "3-D": ((3, 2, 3), (4, 3, 5), {"strides": (1, 2, 2), "feature_group_count": 2}),
    "circular": ((3, 4), (5, 6), {"padding": "CIRCULAR", "kernel_dilation": (2, 1)}),
    "zeros-between": (
        (3, 4),
        (5, 6),
        {"input_dilation": (2, 3), "padding": ((1, 2), (2, 2)), "strides": (1, 2)},
    ),
    "zeros-between-dilated-taps": (
        (3,),
        (50,),
        {"input_dilation": 2, "kernel_dilation": 3, "padding": ((4, 1),)},
    ),
}
each_geometry = pytest.mark.parametrize(
    ("taps", "size", "geometry"), GEOMETRIES.values(), ids=GEOMETRIES.keys()
)


def draw(taps=(3, 3), groups=1, seed=0):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(0.2, 0.5, (*taps, CHANNELS // groups, FEATURES))
    mean, var = rng.normal(size=CHANNELS), rng.uniform(0.2, 2, CHANNELS)
    bias = rng.normal(size=FEATURES)
    return [np.float32(a) for a in (mean, var, kernel, bias)]


@functools.partial(jax.jit, static_argnums=4, static_argnames=ARGUMENTS)
def predict(mean, var, kernel, bias, size, **geometry):
    state = kf.KalmanState(mean, var)
    return kf.filter.predict_conv(state, kernel, size, bias=bias, **geometry)


@each_geometry
def test_against_numpy(taps, size, geometry):
    groups = geometry.get("feature_group_count", 1)
    mean, var, kernel, bias = draw(taps, groups)
    state = predict(mean, var, kernel, bias, size, **geometry)
    expected = reference.conv(mean, var, kernel, size, bias=bias, **geometry)
    chex.assert_trees_all_close(tuple(state), expected, rtol=1e-5, atol=1e-5)


@each_geometry
def test_against_sampling(taps, size, geometry):
    groups = geometry.get("feature_group_count", 1)
    mean, var, kernel, bias = draw(taps, groups)
    predicted = predict(mean, var, kernel, bias, size, **geometry)
    rng = np.random.default_rng(1)
    maps = 18_000 if np.prod(size) < 60 else 7_000
    x = rng.normal(mean, np.sqrt(var), (maps, *size, CHANNELS)).astype(np.float32)
    conv = nn.Conv(FEATURES, taps, precision=lax.Precision.HIGHEST, **geometry)
    y = conv.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    assert_moments(y, *predicted)


def test_a_reflecting_border_reads_values_twice():
    """Which is left out, and so wrong in one of many positions."""
    mean, var, kernel, bias = draw((3,))
    geometry = {"padding": "REFLECT"}
    state = predict(mean, var, kernel, bias, (100,), **geometry)
    expected = reference.conv(mean, var, kernel, (100,), bias=bias, **geometry)
    chex.assert_trees_all_close(state.mean, expected[0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(state.var, expected[1], rtol=0.02)


@pytest.mark.parametrize("groups", [1, 2])
def test_leading_axes_are_independent_states(groups):
    *_, kernel, bias = draw(groups=groups)
    geometry = {"feature_group_count": groups}
    rng = np.random.default_rng(1)
    mean = rng.normal(size=(2, 3, CHANNELS))
    var = rng.uniform(0.2, 2, (2, 3, CHANNELS))
    state = kf.KalmanState(mean, var)
    state = kf.filter.predict_conv(state, kernel, (5, 6), bias=bias, **geometry)
    chex.assert_shape([*state], (2, 3, FEATURES))
    for i in np.ndindex(2, 3):
        expected = reference.conv(
            mean[i], var[i], kernel, (5, 6), bias=bias, **geometry
        )
        chex.assert_trees_all_close((state.mean[i], state.var[i]), expected, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 3, 64, 32), (1, 1, 256, 64), (1, 1, 64, 256)])
def test_of_the_kernel_only_the_square_is_kept(shape):
    """Not a transposed copy, beside it, as XLA:CPU would by other products."""

    def score(kernel, mean, var):
        mean, var = kf.filter.predict_conv(kf.KalmanState(mean, var), kernel, (8, 8))
        return jnp.sum(jnp.square(mean) + jnp.square(var))

    kernel, state = jnp.ones(shape), jnp.ones(shape[2])
    gradients = jax.jit(jax.grad(score, argnums=(0, 1, 2)))
    compiled = gradients.lower(kernel, state, state).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.3 * kernel.nbytes


def test_floats_stand_for_every_channel():
    *_, kernel, _ = draw()
    state = kf.filter.predict_conv(kf.KalmanState(0.5, 1.0), kernel, (6, 6))
    expected = reference.conv(np.full(CHANNELS, 0.5), np.ones(CHANNELS), kernel, (6, 6))
    chex.assert_trees_all_close(tuple(state), expected, rtol=1e-4)


def test_variance_survives_a_mean_of_1e4():
    """Where no border varies the mean, a large one adds nothing to the variance."""
    _, var, kernel, _ = draw()
    mean = np.full(CHANNELS, 1e4, np.float32)
    state = kf.filter.predict_conv(
        kf.KalmanState(mean, var), kernel, (8, 8), padding="VALID"
    )
    expected = np.einsum("c,hwcd->d", var, kernel**2)
    chex.assert_trees_all_close(state.var, expected, rtol=1e-4)


def test_second_derivatives():
    """The variance is a quadratic function of the mean, and so equals its expansion."""
    mean, var, kernel, bias = draw()

    def variance(mean):
        return predict(mean, var, kernel, bias, (5, 6)).var

    hessian = jax.hessian(variance)(mean)  # [D, C, C]
    expanded = variance(0.0 * mean) + 0.5 * mean @ hessian @ mean
    chex.assert_trees_all_close(variance(mean), expanded, rtol=1e-5)


def test_variance_is_never_negative():
    """Of four taps outside at the same positions, which cancel but for rounding."""
    kernel = np.random.default_rng(0).normal(size=(1, 6, 1, 64)).astype(np.float32)
    kernel[0, 0] = -kernel[0, 1:4].sum(axis=0)
    geometry = dict(strides=(1, 4), padding=((0, 0), (4, 0)))
    state = kf.filter.predict_conv(kf.KalmanState(1.0, 0.0), kernel, (1, 8), **geometry)
    assert 0.0 <= np.min(state.var) <= np.max(state.var) < 1e-9


def test_bfloat16_kernel_gives_a_float32_state():
    mean, var, kernel, bias = draw()
    kernel = jnp.asarray(kernel, jnp.bfloat16)
    state = kf.filter.predict_conv(kf.KalmanState(mean, var), kernel, (5, 5), bias=bias)
    chex.assert_type([*state], jnp.float32)
    kernel = np.asarray(kernel, np.float32)
    expected = reference.conv(mean, var, kernel, (5, 5), bias=bias)
    chex.assert_trees_all_close(tuple(state), expected, rtol=1e-4, atol=1e-5)


def test_numerical_gradients():
    mean, var, kernel, bias = draw((2, 3))
    kernel, bias = kernel[..., :2], bias[:2]

    @jax.jit
    def loss(mean, var, kernel, bias):
        state = kf.KalmanState(mean, var)
        state = kf.filter.predict_conv(state, kernel, (4, 5), bias=bias)
        return jnp.sum(jnp.sin(state.mean) + jnp.log(state.var))

    check_grads(
        loss,
        (mean, var, kernel, bias),
        order=1,
        modes=["rev"],
        atol=1e-2,
        rtol=1e-2,
        eps=3e-3,
    )


@pytest.mark.parametrize(
    ("channels", "arguments", "message"),
    [
        (3, {}, r"shape \(3,\).* 4 channels"),
        (4, {"feature_group_count": 2}, r"shape \(4,\).* 8 channels"),
        (4, {"padding": "VALID", "input_size": (8, 2)}, "3 taps.*2 positions.*empty"),
        (
            4,
            {"padding": "VALID", "input_size": (4, 8), "kernel_dilation": (2, 1)},
            r"3 taps \(dilation 2\).*4 positions",
        ),
        (4, {"strides": (1,)}, r"strides is \(1,\); expected 2 numbers"),
        (4, {"input_size": (8,)}, r"input_size is \(8,\); expected 2 numbers"),
        (4, {"input_size": (8, None)}, "needs numbers.*the state is unknown: None"),
        (
            4,
            {"padding": ((1, 1),)},
            r"padding is \(\(1, 1\),\); expected .* 2 integers",
        ),
        (4, {"padding": "EVEN"}, "padding is 'EVEN'; expected one of.*CIRCULAR"),
        (4, {"input_dilation": 2}, "'SAME' with input_dilation.*in numbers"),
    ],
)
def test_errors(channels, arguments, message):
    *_, kernel, _ = draw()
    state = kf.KalmanState(jnp.zeros(channels), jnp.ones(channels))
    with pytest.raises(ValueError, match=message):
        kf.filter.predict_conv(state, kernel, **{"input_size": (8, 8), **arguments})
