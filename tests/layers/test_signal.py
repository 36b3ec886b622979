"""Layers give back what they are given, and signals add."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal

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


def test_signal_is_a_pytree(value):
    signal = Signal(value, KalmanState(jnp.zeros(4), jnp.ones(4)))
    chex.assert_trees_all_close(jax.jit(kf.relu)(signal), kf.relu(signal), rtol=1e-6)
    assert jax.jit(kf.relu)(Signal(value)).state is None
