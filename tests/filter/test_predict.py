import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import kalman_flax as kf
from tests.reference import kalman as reference
from tests.reference.statistics import assert_moments

RNG = np.random.default_rng(0)
SCALE, BIAS = np.float32(RNG.normal(size=(2, 5)))
KERNEL, SHIFT = np.float32(RNG.normal(size=(5, 3))), np.float32(RNG.normal(size=3))
FILTER = np.float32(RNG.normal(0.3, 1, (3, 2, 5, 2)))


def gelu(x):
    return jax.nn.gelu(x, approximate=False)


def draw(shape=(5,), seed=1):
    rng = np.random.default_rng(seed)
    return kf.KalmanState(
        np.float32(rng.normal(size=shape)), np.float32(rng.uniform(0.2, 2, shape))
    )


# name: (prediction, the same in NumPy, the operation itself)
POINTWISE = {
    "dense": (
        lambda s: kf.filter.predict_dense(s, KERNEL, SHIFT),
        lambda m, v: reference.dense(m, v, KERNEL, SHIFT),
        lambda x: x @ KERNEL + SHIFT,
    ),
    "affine": (
        lambda s: kf.filter.predict_affine(s, SCALE, BIAS),
        lambda m, v: reference.affine(m, v, SCALE, BIAS),
        lambda x: SCALE * x + BIAS,
    ),
    "relu": (kf.filter.predict_relu, reference.relu, lambda x: np.maximum(x, 0)),
    "gelu": (
        lambda s: kf.filter.predict_pointwise(s, gelu),
        lambda m, v: reference.pointwise(m, v, gelu),
        lambda x: np.asarray(gelu(np.float32(x))),
    ),
    "tanh": (
        lambda s: kf.filter.predict_pointwise(s, jnp.tanh),
        lambda m, v: reference.pointwise(m, v, np.tanh),
        np.tanh,
    ),
    "cube": (
        lambda s: kf.filter.predict_pointwise(s, lambda x: x**3 - x, order=7),
        lambda m, v: (
            m**3 + 3 * m * v - m,
            9 * m**4 * v + 36 * m**2 * v**2 + 15 * v**3 - 6 * m**2 * v - 6 * v**2 + v,
        ),
        lambda x: x**3 - x,
    ),
    "pad_channels": (
        lambda s: kf.filter.predict_pad_channels(s, 1, 2),
        lambda m, v: (np.array([0, *m, 0, 0]), np.array([0, *v, 0, 0])),
        lambda x: np.pad(x, [(0, 0), (1, 2)]),
    ),
}
each_pointwise = pytest.mark.parametrize(
    ("name", "predict", "in_numpy", "operation"),
    [(name, *case) for name, case in POINTWISE.items()],
    ids=POINTWISE.keys(),
)


@each_pointwise
def test_against_numpy(name, predict, in_numpy, operation):
    state = draw()
    chex.assert_trees_all_close(
        tuple(predict(state)),
        in_numpy(*np.float64([*state])),
        rtol=1e-4,
        atol=2e-4 if name == "tanh" else 1e-5,  # what 32 nodes leave, at variance 2
    )


@each_pointwise
def test_against_sampling(name, predict, in_numpy, operation):
    mean, var = draw()
    x = np.random.default_rng(2).normal(mean, np.sqrt(var), (400_000, 5))
    predicted = predict(kf.KalmanState(mean, var))
    assert_moments(operation(x), *predicted, atol=2e-4 if name == "tanh" else 1e-6)


def test_sum_and_concatenation_against_numpy():
    (m, v), (n, w) = a, b = draw(), draw(seed=2)
    chex.assert_trees_all_close(tuple(kf.filter.predict_sum(a, b)), (m + n, v + w))
    c = kf.KalmanState(n[:2], w[:2])
    chex.assert_trees_all_close(
        tuple(kf.filter.predict_concatenate([a, c, b])),
        (np.array([*m, *n[:2], *n]), np.array([*v, *w[:2], *w])),
    )


def test_one_state_of_all_examples_joins_those_of_each():
    one, each = draw(), jax.tree.map(lambda s: jnp.stack([s, 2 * s]), draw(seed=2))
    joined = kf.filter.predict_concatenate([one, each])
    for n in range(2):
        of_example = jax.tree.map(lambda s, n=n: s[n], each)
        chex.assert_trees_all_equal(
            jax.tree.map(lambda s, n=n: s[n], joined),
            kf.filter.predict_concatenate([one, of_example]),
        )


def test_states_stay_float32_where_64_bits_are_enabled():
    with jax.enable_x64(True):
        kernel = jnp.ones((3, 3, 5, 5), jnp.float32)
        state = kf.KalmanState(*(jnp.float32(s) for s in draw()))
        for predicted in (
            kf.filter.predict_relu(state),
            kf.filter.predict_pointwise(state, jnp.tanh),
            kf.filter.predict_conv(state, kernel, (4, 4)),
            kf.filter.sample_conv(jax.random.key(0), state, kernel, (4, 4)),
        ):
            assert {s.dtype for s in predicted} == {jnp.dtype(jnp.float32)}


def test_sum_and_concatenation_against_sampling():
    a, b = draw(), draw(seed=2)
    rng = np.random.default_rng(3)
    x, y = (rng.normal(s.mean, np.sqrt(s.var), (200_000, 5)) for s in (a, b))
    assert_moments(x + y, *kf.filter.predict_sum(a, b))
    c = kf.KalmanState(b.mean[:2], b.var[:2])
    joined = np.concatenate([x, y[:, :2]], axis=-1)
    assert_moments(joined, *kf.filter.predict_concatenate([a, c]))


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("padding", ["VALID", "SAME", ((0, 2),)])
def test_avg_pool_of_neighbours_that_are_alike(padding, count_include_pad):
    state = draw()
    options = {"strides": 2, "padding": padding, "count_include_pad": count_include_pad}
    pooled = kf.filter.predict_avg_pool(state, (3,), (11,), **options)
    expected = reference.avg_pool(*state, 3, 11, 2, padding, count_include_pad)
    chex.assert_trees_all_close(tuple(pooled), expected, rtol=1e-5)
    if padding == "VALID" or not count_include_pad:
        chex.assert_trees_all_equal(pooled, state)


def test_product_against_sampling():
    a, b = draw(), draw(seed=2)
    rng = np.random.default_rng(3)
    x, y = (rng.normal(s.mean, np.sqrt(s.var), (200_000, 5)) for s in (a, b))
    assert_moments(x * y, *kf.filter.predict_product(a, b))


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_dropout_against_sampling(rate):
    state = draw()
    x = np.random.default_rng(3).normal(state.mean, np.sqrt(state.var), (200_000, 5))
    dropout = nn.Dropout(rate, deterministic=False)
    dropped = dropout.apply({}, np.float32(x), rngs={"dropout": jax.random.key(0)})
    assert_moments(dropped, *kf.filter.predict_dropout(state, rate))


def test_groups_against_numpy():
    state = draw((3, 4))
    mean, var = (s.reshape(3, 2, 2) for s in np.float64([*state]))
    expected = mean.mean(2), var.mean(2) + mean.var(2)
    chex.assert_trees_all_close(
        tuple(kf.filter.predict_group(state, 2)),
        tuple(np.repeat(s, 2, -1) for s in expected),
        rtol=1e-5,
    )


def test_floats_are_the_state_of_any_group():
    state = kf.KalmanState(0.5, 2.0)
    chex.assert_trees_all_close(kf.filter.predict_group(state, 4), state)


@pytest.mark.parametrize(
    "predict",
    [
        lambda s: kf.filter.predict_pad_channels(s, 1, 2),
        lambda s: kf.filter.predict_concatenate([draw(), s]),
    ],
    ids=["pad_channels", "concatenate"],
)
def test_floats_do_not_say_how_many_channels_they_are_of(predict):
    floats, full = kf.KalmanState(0.5, 1.0), kf.KalmanState(np.full(5, 0.5), np.ones(5))
    with pytest.raises(ValueError, match="for_channels"):
        predict(floats)
    for state in kf.filter.for_channels(floats, 5), kf.KalmanState(0.5, full.var):
        chex.assert_trees_all_equal(predict(state), predict(full))


A, SIGMA = np.meshgrid(np.linspace(-6, 6, 49), [1e-3, 1.0, 100.0])


def test_relu_from_deep_below_to_far_above_zero():
    """Accurate in units of sigma for a = mu / sigma in [-6, 6]."""
    state = kf.KalmanState(np.float32(A * SIGMA), np.float32(SIGMA**2))
    mean, var = reference.relu(*np.float64([*state]))
    out = kf.filter.predict_relu(state)
    np.testing.assert_allclose(out.mean / SIGMA, mean / SIGMA, rtol=0, atol=2e-6)
    np.testing.assert_allclose(out.var / SIGMA**2, var / SIGMA**2, rtol=0, atol=5e-6)


def test_variance_after_relu_is_never_negative():
    """Not even where all that is left of it is rounding, about a = -13."""
    a = np.linspace(-15, 8, 2301, dtype=np.float32)
    assert np.all(kf.filter.predict_relu(kf.KalmanState(a, np.ones_like(a))).var >= 0)


EXTREME_MEANS = [-1e4, -1.0, -1e-6, 0.0, 1e-6, 1.0, 1e4]
EXTREME_VARS = [0.0, 1e-30, 1e-12, 1.0, 1e12]


@pytest.mark.parametrize(
    ("predict", "fn"),
    [(kf.filter.predict_relu, jax.nn.relu), (POINTWISE["gelu"][0], gelu)],
    ids=["relu", "gelu"],
)
def test_extreme_states_stay_finite(predict, fn):
    """Values and gradients, at no variance and at huge mu / sigma."""
    state = kf.KalmanState(
        *map(np.float32, np.meshgrid(EXTREME_MEANS, EXTREME_VARS, indexing="ij"))
    )
    mean, var = predict(state)
    chex.assert_tree_all_finite((mean, var))
    assert np.all(var >= 0)
    for i in range(2):
        grads = jax.jit(jax.grad(lambda s, i=i: jnp.sum(predict(s)[i])))(state)
        chex.assert_tree_all_finite(grads)
    constant = state.mean[:, 0]  # at variance 0 it is the function itself
    np.testing.assert_allclose(mean[:, 0], fn(constant), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(var[:, 0], 0, atol=1e-6)


def test_variance_survives_a_mean_of_1e4():
    state = kf.KalmanState(np.float32([1e4]), np.float32([1.0]))
    for through in (
        kf.filter.predict_relu(state),
        kf.filter.predict_pointwise(state, gelu),
        kf.filter.predict_avg_pool(state, (2, 2), (4, 4)),
        kf.filter.predict_affine(state, 1.0, -1e4),
    ):
        np.testing.assert_allclose(through.var, 1, rtol=2e-3)


@pytest.mark.parametrize("name", ["dense", "affine", "relu", "gelu"])
def test_floats_stand_for_every_channel(name):
    predict, *_ = POINTWISE[name]
    full = kf.KalmanState(np.full(5, 0.5, np.float32), np.ones(5, np.float32))
    for short, expected in zip(predict(kf.KalmanState(0.5, 1.0)), predict(full)):
        short = jnp.broadcast_to(short, expected.shape)
        chex.assert_trees_all_close(short, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("predict", "in_numpy", "weights"),
    [
        (kf.filter.predict_dense, reference.dense, (KERNEL, SHIFT)),
        (kf.filter.predict_affine, reference.affine, (SCALE, BIAS)),
    ],
    ids=["dense", "affine"],
)
def test_bfloat16_weights_give_a_float32_state(predict, in_numpy, weights):
    weights = [jnp.asarray(w, jnp.bfloat16) for w in weights]
    state = predict(draw(), *weights)
    chex.assert_type([*state], jnp.float32)
    expected = in_numpy(*draw(), *(np.float64(w) for w in weights))
    chex.assert_trees_all_close(tuple(state), expected, rtol=1e-5, atol=1e-5)


PREDICTIONS = {name: case[0] for name, case in POINTWISE.items()} | {
    "conv": lambda s: kf.filter.predict_conv(s, FILTER, (5, 4), strides=(2, 1)),
    "avg_pool": lambda s: kf.filter.predict_avg_pool(s, (2,), (4,), padding=1),
    "product": lambda s: kf.filter.predict_product(s, draw()),
    "dropout": lambda s: kf.filter.predict_dropout(s, 0.3),
    "sum": lambda s: kf.filter.predict_sum(s, s),
    "concatenate": lambda s: kf.filter.predict_concatenate([s, s]),
}
each_prediction = pytest.mark.parametrize(
    "predict", PREDICTIONS.values(), ids=PREDICTIONS.keys()
)


def shard_map(fn):
    mesh = jax.make_mesh((4,), ("r",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(fn, mesh=mesh, in_specs=P("r"), out_specs=P("r"))


TRANSFORMS = {
    "jit": lambda fn: fn,
    "vmap": jax.vmap,
    "scan": lambda fn: lambda states: jax.lax.map(fn, states),
    "shard_map": shard_map,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@each_prediction
def test_under_transformations(predict, transform):
    """States ``[4, 3, C]`` of replicas are that many states."""
    states = draw((4, 3, 5))
    with jax.numpy_rank_promotion("raise"):
        out = jax.jit(transform(predict))(states)
    chex.assert_type([*out], jnp.float32)
    one = predict(kf.KalmanState(states.mean[2, 1], states.var[2, 1]))
    chex.assert_trees_all_close(
        jax.tree.map(lambda s: s[2, 1], out), one, rtol=1e-5, atol=1e-6
    )
    chex.assert_tree_shape_prefix(out, (4, 3))


@each_prediction
def test_numerical_gradients(predict):
    @jax.jit
    def loss(mean, var):
        out = jax.remat(predict)(kf.KalmanState(mean, var))
        return jnp.sum(jnp.sin(out.mean) + jnp.log1p(out.var))

    check_grads(
        loss, tuple(draw()), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=3e-3
    )


def test_numerical_gradients_through_a_chain_to_the_weights():
    """Convolution, update, normalisation, ReLU, dense: from end to end."""
    kernel = np.float32(RNG.normal(0.2, 0.4, (2, 2, 2, 3)))
    weights = np.float32(RNG.normal(size=(3, 2)))
    observed = draw((3,))

    @jax.jit
    def loss(state, kernel, gain, scale, weights):
        state = kf.filter.predict_conv(kf.KalmanState(*state), kernel, (4, 3))
        state = kf.filter.update(state, observed, gain)
        state = kf.filter.predict_affine(state, scale, 0.1)
        state = kf.filter.predict_dense(kf.filter.predict_relu(state), weights)
        return jnp.sum(jnp.sin(state.mean) + jnp.log(state.var))

    scale = np.float32([0.5, 1.0, 1.5])
    arguments = tuple(draw((2,))), kernel, np.float32(0.3), scale, weights
    check_grads(loss, arguments, order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=3e-3)


def test_gradients_of_relu_at_zero_mean_and_scale():
    """Where training starts: beta = 0, and a zero-initialised gamma in some."""

    def relu(mean, scale):
        mean, var = kf.filter.predict_relu(kf.KalmanState(mean, jnp.square(scale)))
        return jnp.stack([mean, var])

    gradient = jax.jit(jax.jacobian(relu))
    density = 1 / np.sqrt(2 * np.pi)
    chex.assert_trees_all_close(gradient(0.0, 1.0), np.array([0.5, density]), rtol=1e-5)
    chex.assert_tree_all_finite(jax.jit(jax.jacobian(relu, argnums=1))(0.0, 0.0))


def test_dense_with_another_number_of_channels():
    with pytest.raises(ValueError, match=r"mean has shape \(4,\).* 5 channels"):
        kf.filter.predict_dense(draw((4,)), KERNEL)
