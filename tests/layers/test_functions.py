"""Values are Flax's; states follow the pure functions (which have their own tests)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal

STATE = KalmanState(jnp.array([-1.0, 0.0, 2.0]), jnp.array([0.5, 1.0, 4.0]))


@pytest.fixture
def x():
    return Signal(jax.random.normal(jax.random.key(0), (2, 5, 7, 3)), STATE)


def close(actual, expected):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5), actual, expected
    )


def test_relu(x):
    close(kf.relu(x), Signal(nn.relu(x.value), kf.filter.predict_relu(STATE)))


def test_activation_takes_any_pointwise_function(x):
    square = kf.activation(jnp.square)(x)
    mean, var = STATE
    np.testing.assert_array_equal(square.value, jnp.square(x.value))
    # Of a Gaussian: E[x^2] = m^2 + v, Var[x^2] = 2 v^2 + 4 m^2 v.
    close(square.state, KalmanState(mean**2 + var, 2 * var**2 + 4 * mean**2 * var))


def test_activation_order_is_the_number_of_nodes(x):
    # Two nodes, at mean +- std, know nothing of the fourth moment of a Gaussian.
    mean, var = kf.activation(jnp.square, order=2)(x).state
    np.testing.assert_allclose(mean, STATE.mean**2 + STATE.var, rtol=1e-5)
    np.testing.assert_allclose(var, 4 * STATE.mean**2 * STATE.var, atol=1e-5)


@pytest.mark.parametrize("padding", ["VALID", "SAME", ((1, 0), (0, 1))])
@pytest.mark.parametrize("name", ["avg_pool", "max_pool"])
def test_pools_as_flax_does(name, padding, x):
    args = ((2, 3), (2, 1), padding)
    expected = getattr(nn, name)(x.value, *args)
    np.testing.assert_array_equal(getattr(kf, name)(x, *args).value, expected)


@pytest.mark.parametrize("count_include_pad", [True, False])
def test_avg_pool_predicts_with_its_geometry(count_include_pad, x):
    options = {"padding": "SAME", "count_include_pad": count_include_pad}
    pooled = kf.avg_pool(x, (2, 3), (2, 1), **options)
    expected = kf.filter.predict_avg_pool(
        STATE, (2, 3), (5, 7), strides=(2, 1), **options
    )
    close(pooled.state, expected)


def test_max_pool_observes_afresh(x):
    pooled = kf.max_pool(x, (2, 2))
    flat = np.asarray(pooled.value, np.float64).reshape(-1, 3)
    close(pooled.state, KalmanState(flat.mean(0), flat.var(0)))


def test_max_pool_observes_each_example_where_each_has_a_state(x):
    state = KalmanState(*(jnp.stack([stat, stat]) for stat in STATE))
    pooled = kf.max_pool(x.replace(state=state), (2, 2))
    flat = np.asarray(pooled.value, np.float64).reshape(2, -1, 3)
    close(pooled.state, KalmanState(flat.mean(1), flat.var(1)))


def test_global_avg_pool_ends_the_filter(x):
    pooled = kf.global_avg_pool(x)
    assert pooled.state is None
    np.testing.assert_allclose(pooled.value, np.mean(x.value, (1, 2)), rtol=1e-5)


def test_pad_channels_pads_value_and_state_with_zeros(x):
    padded = kf.pad_channels(x, 1, 2)
    np.testing.assert_array_equal(padded.value[..., 1:4], x.value)
    assert padded.value.shape == (2, 5, 7, 6)
    assert not padded.value[..., [0, 4, 5]].any()
    np.testing.assert_array_equal(padded.state.mean, [0, -1, 0, 2, 0, 0])
    np.testing.assert_array_equal(padded.state.var, [0, 0.5, 1, 4, 0, 0])


def test_concatenate_joins_value_and_state(x):
    other = Signal(x.value[..., :2], KalmanState(3.0, 0.25))
    joined = kf.concatenate([other, x])
    np.testing.assert_array_equal(joined.value[..., 2:], x.value)
    np.testing.assert_array_equal(joined.state.mean, [3, 3, -1, 0, 2])
    np.testing.assert_array_equal(joined.state.var, [0.25, 0.25, 0.5, 1, 4])


@pytest.mark.parametrize("unknown", [lambda v: v, Signal], ids=["array", "signal"])
def test_concatenate_with_the_unknown_is_unknown(unknown, x):
    joined = kf.concatenate([x, unknown(x.value)])
    assert isinstance(joined, Signal)
    assert joined.state is None


def test_pools_of_half_precision_keep_their_dtype(x):
    half = x.value.astype(jnp.bfloat16)
    for pooled in (kf.avg_pool(half, (2, 2)), kf.max_pool(half, (2, 2))):
        assert pooled.dtype == jnp.bfloat16
    state = kf.max_pool(Signal(half), (2, 2)).state
    assert state.mean.dtype == state.var.dtype == jnp.float32


def test_concatenate_along_positions_mixes_what_is_known(x):
    joined = kf.concatenate([x, x], axis=1)
    assert joined.shape == (2, 10, 7, 3)
    assert joined.state is None
    for axis in (-1, 3):
        assert kf.concatenate([x, x], axis=axis).state is not None
    assert kf.concatenate([x, x], dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("method", ["nearest", "bilinear"])
def test_resize_leaves_the_state_of_neighbours_that_are_alike(method, x):
    shape = (2, 10, 21, 3)
    larger = kf.resize(x, shape, method)
    expected = jax.image.resize(x.value, shape, method)
    np.testing.assert_array_equal(larger.value, expected)
    close(larger.state, STATE)
    np.testing.assert_array_equal(kf.resize(x.value, shape, method), expected)
    assert kf.resize(x, (2, 5, 7, 6), method).state is None  # of other channels


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_dropout_is_that_of_flax_and_predicts(rate, x):
    ours, theirs = kf.Dropout(rate), nn.Dropout(rate)
    rngs = {"dropout": jax.random.key(1)}
    out = ours.apply({}, x, False, rngs=rngs)
    expected = theirs.apply({}, x.value, False, rngs=rngs)
    np.testing.assert_array_equal(out.value, expected)
    close(out.state, kf.filter.predict_dropout(STATE, rate))
    close(ours.apply({}, x, deterministic=True), x)
    np.testing.assert_array_equal(ours.apply({}, x.value, False, rngs=rngs), expected)
