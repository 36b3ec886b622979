"""Layers give back what they are given; what signals are, and what they are not."""

import operator

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal
from tests.reference.statistics import assert_moments

KEY = jax.random.key(0)

LAYERS = {
    "Conv": lambda: kf.Conv(6, (3, 3)),
    "Dense": lambda: kf.Dense(6),
    "KalmanNorm": lambda: kf.KalmanNorm(use_running_average=False),
    "BatchNorm": lambda: kf.baselines.BatchNorm(use_running_average=False),
    "GroupNorm": lambda: kf.baselines.GroupNorm(num_groups=2),
    "relu": lambda: kf.relu,
    "activation": lambda: kf.activation(jnp.tanh),
    "avg_pool": lambda: lambda x: kf.avg_pool(x, (2, 2)),
    "max_pool": lambda: lambda x: kf.max_pool(x, (2, 2)),
    "global_avg_pool": lambda: kf.global_avg_pool,
    "pad_channels": lambda: lambda x: kf.pad_channels(x, 1, 2),
    "concatenate": lambda: lambda x: kf.concatenate([x, x]),
    "ConvTranspose": lambda: kf.ConvTranspose(6, (3, 3)),
    "resize": lambda: lambda x: kf.resize(x, (2, 8, 8, 4), "bilinear"),
    "Dropout": lambda: kf.Dropout(0.5, deterministic=True),
}
FORGET = {"GroupNorm", "global_avg_pool"}  # give a Signal of unknown state
OBSERVE = {"KalmanNorm", "BatchNorm", "max_pool"}  # know their output of themselves


def call(name, x):
    layer = LAYERS[name]()
    if not hasattr(layer, "init_with_output"):
        return layer(x)
    return layer.init_with_output(jax.random.key(0), x)[0]


@pytest.fixture
def value():
    return jax.random.normal(jax.random.key(1), (2, 4, 4, 4))


@pytest.mark.parametrize("name", LAYERS)
def test_plain_array_gives_plain_array(name, value):
    assert isinstance(call(name, value), jax.Array)


@pytest.mark.parametrize("name", LAYERS)
def test_unknown_state_stays_unknown_and_the_value_is_the_same(name, value):
    out = call(name, Signal(value))
    assert isinstance(out, Signal)
    assert (out.state is not None) == (name in OBSERVE)
    np.testing.assert_array_equal(out.value, call(name, value))


@pytest.mark.parametrize("name", LAYERS)
def test_known_state_moves_along(name, value):
    state = KalmanState(jnp.linspace(-1.0, 1.0, 4), jnp.linspace(0.5, 2.0, 4))
    out = call(name, Signal(value, state))
    assert isinstance(out, Signal)
    if name in FORGET:
        assert out.state is None
        return
    channels = out.value.shape[-1:]
    chex.assert_shape(list(out.state), channels)
    chex.assert_tree_all_finite(out.state)
    if name != "KalmanNorm":  # which normalises by the state
        np.testing.assert_array_equal(out.value, call(name, value))


@pytest.mark.parametrize("name", sorted(set(LAYERS) - FORGET))
def test_floats_stand_for_every_channel(name, value):
    every = KalmanState(jnp.full(4, 0.5), jnp.full(4, 2.0))
    given, expected = (
        call(name, Signal(value, s)) for s in (KalmanState(0.5, 2.0), every)
    )
    chex.assert_trees_all_close(given, expected)


@pytest.mark.parametrize("name", ["Conv", "Dense", "relu", "avg_pool", "KalmanNorm"])
def test_state_of_other_channels_is_refused(name, value):
    state = KalmanState(jnp.zeros(3), jnp.ones(3))
    with pytest.raises(ValueError, match=r"\(3,\).*4 channels"):
        call(name, Signal(value, state))


def test_sum_of_signals_adds_means_and_variances(value):
    a = Signal(value, KalmanState(jnp.arange(4.0), jnp.full(4, 2.0)))
    b = Signal(2 * value, KalmanState(1.0, 0.5))
    total = a + b
    np.testing.assert_allclose(total.value, 3 * value, rtol=1e-6)
    np.testing.assert_array_equal(total.state.mean, [1.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(total.state.var, np.full(4, 2.5))


@pytest.mark.parametrize(
    "add",
    [
        lambda signal, array: signal + Signal(array),
        lambda signal, array: Signal(array) + signal,
        lambda signal, array: signal + array,
        lambda signal, array: array + signal,
        lambda signal, array: signal + np.asarray(array),
        lambda signal, array: np.asarray(array) + signal,
    ],
    ids=["+ unknown", "unknown +", "+ array", "array +", "+ numpy", "numpy +"],
)
def test_sum_with_the_unknown_is_unknown(add, value):
    total = add(Signal(value, KalmanState(0.0, 1.0)), value)
    assert isinstance(total, Signal)
    assert total.state is None
    np.testing.assert_allclose(total.value, 2 * value, rtol=1e-6)


STATE = KalmanState(jnp.array([-1.0, 0.0, 1.0, 2.0]), jnp.array([0.5, 1.0, 2.0, 4.0]))
GAMMA = np.array([0.5, -1.0, 2.0, 3.0], np.float32)

# An operation of one signal that its state follows exactly.
EXACT = {
    "+ 1": lambda x: x + 1.0,
    "1 -": lambda x: 1.0 - x,
    "- 1": lambda x: x - 1,
    "/ 3": lambda x: x / 3.0,
    "2 *": lambda x: 2 * x,
    "-x": lambda x: -x,
    "* gamma": lambda x: x * GAMMA,
    "gamma *": lambda x: jnp.asarray(GAMMA) * x,
    "/ [1, C]": lambda x: x / GAMMA.reshape(1, 4),
    "[1] -": lambda x: jnp.ones(1) - x,
    "x + x": lambda x: x + x,
    "x - x": lambda x: x - x,
    "x * x": lambda x: x * x,
}


@pytest.mark.parametrize("operation", EXACT.values(), ids=EXACT)
def test_operations_move_the_state_exactly(operation):
    noise = np.random.default_rng(0).normal(size=(200_000, 4)).astype(np.float32)
    values = STATE.mean + np.sqrt(STATE.var) * noise
    out = operation(Signal(values, STATE))
    np.testing.assert_allclose(out.value, operation(values), rtol=1e-6)
    assert_moments(out.value, *out.state, atol=1e-4)


@pytest.mark.parametrize(
    "operation", [operator.add, operator.sub, operator.mul], ids=["+", "-", "*"]
)
def test_operations_of_two_signals_that_are_independent(operation):
    a, b = np.random.default_rng(0).normal(size=(2, 200_000, 4)).astype(np.float32)
    a, b = (m + np.sqrt(STATE.var) * z for m, z in [(STATE.mean, a), (1.0, b)])
    out = operation(Signal(a, STATE), Signal(b, KalmanState(1.0, STATE.var)))
    np.testing.assert_array_equal(out.value, operation(a, b))
    assert_moments(out.value, *out.state)


def test_a_gate_of_each_example():
    """``[N, 1, 1, C]``, as in squeeze-and-excite."""
    x, gate = (
        Signal(jnp.ones((2, 3, 3, 4)), STATE),
        Signal(jnp.ones((2, 1, 1, 4)), STATE),
    )
    out = x * gate
    assert out.shape == (2, 3, 3, 4)
    chex.assert_trees_all_close(out.state, kf.filter.predict_product(STATE, STATE))


LOST = {
    "+ map": lambda x: x + jnp.ones(x.shape),
    "* map": lambda x: np.ones((4, 4, 1)) * x,
    "- examples": lambda x: x - jnp.ones((2, 1, 1, 1)),
    "1 /": lambda x: 1.0 / x,
    "x / y": lambda x: x / (x + 1.0),
    "mean": lambda x: x.mean((1, 2)),
    "of channels": lambda x: x.mean(-1, keepdims=True),
    "integers": lambda x: x.astype(jnp.int32),
    "new axis": lambda x: x[..., None],
    "one channel": lambda x: x[..., 0],
    "split channels": lambda x: x.reshape(2, 4, 4, 2, 2),
    "mask": lambda x: x[np.ones(x.shape, bool)],
}


@pytest.mark.parametrize("operation", LOST.values(), ids=LOST)
def test_behind_anything_else_the_state_is_unknown(operation, value):
    out = operation(Signal(value, STATE))
    assert isinstance(out, Signal)
    assert out.state is None
    np.testing.assert_allclose(out.value, operation(value), rtol=1e-6)


@pytest.mark.parametrize("examples", [1, 2])
def test_an_array_of_the_values_shape_is_another_activation(examples):
    """Also where one example at one position makes it look like a constant."""
    x = Signal(jnp.ones((examples, 4)), STATE)
    assert (x + jnp.ones((examples, 4))).state is None


KEPT = {
    "[0]": (lambda x: x[0], 1),
    "[:, ::2, 1:]": (lambda x: x[:, ::2, 1:], 1),
    "[...]": (lambda x: x[...], 1),
    "[:, None]": (lambda x: x[:, None], 1),
    "[indices]": (lambda x: x[jnp.array([1, 0])], 1),
    "[..., :]": (lambda x: x[..., :], 1),
    "reshape": (lambda x: x.reshape(2, -1, 4), 1),
    "reshape to a tuple": (lambda x: x.reshape((32, 4)), 1),
    "flat examples": (lambda x: x.reshape(2, -1), 16),
    "bfloat16": (lambda x: x.astype(jnp.bfloat16), 1),
}


@pytest.mark.parametrize(("operation", "repeats"), KEPT.values(), ids=KEPT)
def test_where_the_channels_stay_the_state_stays(operation, repeats, value):
    out = operation(Signal(value, STATE))
    np.testing.assert_array_equal(out.value, operation(value))
    expected = jax.tree.map(lambda s: jnp.tile(s, repeats), STATE)
    chex.assert_trees_all_equal(out.state, expected)


def test_channels_are_picked_of_value_and_state(value):
    out = Signal(value, STATE)[..., 1:3]
    np.testing.assert_array_equal(out.value, value[..., 1:3])
    chex.assert_trees_all_equal(out.state, jax.tree.map(lambda s: s[1:3], STATE))


@pytest.mark.parametrize(
    ("operation", "known"),
    [
        (lambda x: x[:, 1:, ..., 2:], True),
        (lambda x: x[..., 2:], True),
        (lambda x: x * GAMMA + 1.0, True),
        (lambda x: x.reshape(2, 16, 4), True),
        (lambda x: x[:1], False),
        (lambda x: x.reshape(-1, 4), False),
    ],
    ids=["positions", "channels", "affine", "reshape", "examples", "all flat"],
)
def test_states_of_examples_go_with_them(operation, known, value):
    state = jax.tree.map(lambda s: jnp.stack([s, 2 * s]), STATE)
    out = operation(Signal(value, state))
    assert (out.state is not None) == known
    if known:
        assert out.state.mean.shape == (2, out.shape[-1])


def test_it_has_the_shape_of_its_value(value):
    x = Signal(value.astype(jnp.bfloat16), STATE)
    assert (x.shape, x.ndim, x.size, x.dtype) == ((2, 4, 4, 4), 4, 128, jnp.bfloat16)
    assert Signal(value).shape != x[0].shape


def test_sum_of_a_list_keeps_the_state(value):
    total = sum([Signal(value, STATE), Signal(2 * value, STATE)])
    np.testing.assert_array_equal(total.value, 3 * value)
    chex.assert_trees_all_close(total.state, kf.filter.predict_sum(STATE, STATE))


PLAIN = {
    "Conv": lambda x: nn.Conv(3, (3, 3)).init(KEY, x),
    "ConvTranspose": lambda x: nn.ConvTranspose(3, (3, 3)).init(KEY, x),
    "Dense": lambda x: nn.Dense(3).init(KEY, x),
    "BatchNorm": lambda x: nn.BatchNorm(use_running_average=False).init(KEY, x),
    "LayerNorm": lambda x: nn.LayerNorm().init(KEY, x),
    "GroupNorm": lambda x: nn.GroupNorm(2).init(KEY, x),
    "Dropout": lambda x: nn.Dropout(0.5, deterministic=False).apply(
        {}, x, rngs={"dropout": KEY}
    ),
    "relu": nn.relu,
    "gelu": nn.gelu,
    "sigmoid": nn.sigmoid,
    "max_pool": lambda x: nn.max_pool(x, (2, 2)),
    "avg_pool": lambda x: nn.avg_pool(x, (2, 2)),
    "jnp.mean": lambda x: jnp.mean(x, (1, 2)),
    "jnp.concatenate": lambda x: jnp.concatenate([x, x], -1),
    "jnp.reshape": lambda x: jnp.reshape(x, (2, -1)),
    "jnp.pad": lambda x: jnp.pad(x, 1),
    "jnp.asarray": jnp.asarray,
    "np.asarray": np.asarray,
    "lax.exp": jax.lax.exp,
    "resize": lambda x: jax.image.resize(x, (2, 8, 8, 4), "bilinear"),
}


@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
@pytest.mark.parametrize("plain", PLAIN.values(), ids=PLAIN)
def test_a_plain_layer_says_what_a_signal_is(plain, jit, value):
    plain = jax.jit(plain) if jit else plain
    for state in STATE, None:
        with pytest.raises(
            (TypeError, ValueError),
            match=r"an activation with its Kalman state.*kf\.Conv",
        ):
            plain(Signal(value, state))


def test_a_state_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"\(0.0, 1.0\); expected a KalmanState"):
        Signal(value, (0.0, 1.0))


def test_floats_are_filled_up_and_so_can_be_carried(value):
    """Through `lax.cond` and `lax.scan`, which compare types."""
    x = Signal(value, KalmanState(0.0, np.float32(1.0)))
    chex.assert_trees_all_equal(x.state, KalmanState(jnp.zeros(4), jnp.ones(4)))
    layer = kf.Conv(4, (3, 3))
    variables = layer.init(KEY, x)

    def apply(x):
        return layer.apply(variables, x)

    chosen = jax.lax.cond(True, apply, lambda x: x, x)
    chex.assert_trees_all_close(chosen, apply(x), rtol=1e-5)
    scanned, _ = jax.lax.scan(lambda x, _: (apply(x), None), x, length=2)
    chex.assert_trees_all_close(scanned, apply(apply(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("leaf", [None, object(), jax.ShapeDtypeStruct((), "float32")])
def test_any_leaf_may_stand_in_its_place(leaf, value):
    leaves, tree = jax.tree.flatten(Signal(value, STATE))
    signal = jax.tree.unflatten(tree, [leaf] * len(leaves))
    assert signal.value is leaf and signal.state.mean is leaf
    axes = Signal(0, KalmanState(None, None))
    doubled = jax.vmap(lambda x: 2.0 * x, in_axes=(axes,), out_axes=axes)
    chex.assert_trees_all_close(
        doubled(Signal(value, STATE)).state.mean, 2 * STATE.mean
    )


def test_signal_is_a_pytree(value):
    signal = Signal(value, KalmanState(jnp.zeros(4), jnp.ones(4)))
    chex.assert_trees_all_close(jax.jit(kf.relu)(signal), kf.relu(signal), rtol=1e-6)
    assert jax.jit(kf.relu)(Signal(value)).state is None
