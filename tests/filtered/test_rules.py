"""Rules in programs, against the moments of many samples; and a rule of one's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import kalman_flax as kf
from kalman_flax.filtered.belief import Known, Lost, Operand
from kalman_flax.filtered.interpret import Interpreter
from kalman_flax.filtered.rules import RULES

KEY = jax.random.key(0)
SHAPE = (3000, 4, 6, 4)
STATE = kf.KalmanState(
    jnp.array([0.5, -1.0, 0.0, 2.0]), jnp.array([1.0, 0.5, 2.0, 1.5])
)
OTHER = kf.KalmanState(jnp.array([1.0, 0.0, 0.5, 0.0]), jnp.array([0.2, 1.0, 0.5, 0.3]))
ROWS = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
KERNEL = ROWS[:36, :5].reshape(3, 3, 4, 5)
POSITIONS = ROWS[:24, :4].reshape(1, 4, 6, 4)
PER_CHANNEL = 1.0 + np.abs(ROWS[0, :4])


def draw(key, state):
    return state.mean + jnp.sqrt(state.var) * jax.random.normal(key, SHAPE)


def believe(program, *inputs):
    """What is believed of the output of ``program(*arrays)``, and the output."""

    def run(*arrays):
        closed = jax.make_jaxpr(program)(*arrays)
        operands = [
            Operand(array, state and Known.of(state, array.ndim - 1))
            for array, (_, state) in zip(arrays, inputs)
        ]
        output = Interpreter().run(closed.jaxpr, closed.consts, operands)[0]
        belief = output.belief
        if isinstance(belief, Known):
            found.append(belief.axis)
            return output.value, belief.state
        found.append(belief)
        return output.value, None

    found = []
    value, state = jax.jit(run)(*(array for array, _ in inputs))
    return value, state, found[-1]


def conv(x, kernel=KERNEL, strides=(1, 1), padding="SAME", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, **options
    )


def gated(x, y):
    gate = nn.sigmoid(y.mean((1, 2), keepdims=True) * 4)
    return x * gate


def pre_padded(x, y):
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return conv(x, strides=(2, 2), padding="VALID")


def channels_first(x, y):
    x = jnp.transpose(x, (0, 3, 1, 2))
    numbers = ("NCHW", "OIHW", "NCHW")
    kernel = KERNEL.transpose(3, 2, 0, 1)
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers
    )


def stochastic_depth(x, y):
    mask = jax.random.bernoulli(KEY, 0.7, (SHAPE[0], 1, 1, 1))
    return x / 0.7 * mask.astype(x.dtype) + y


PROGRAMS = {
    "affine": lambda x, y: (PER_CHANNEL - 2.0 * x) / 3.0 + PER_CHANNEL,
    "relu": lambda x, y: nn.relu(x),
    "relu of a relu": lambda x, y: nn.relu(nn.relu(x) - 0.5),
    "gelu": lambda x, y: nn.gelu(x),
    "exact gelu": lambda x, y: nn.gelu(x, approximate=False),
    "silu": lambda x, y: nn.silu(PER_CHANNEL * x),
    "leaky relu": lambda x, y: nn.leaky_relu(x, 0.2),
    "hard swish": lambda x, y: nn.hard_swish(x),
    "where": lambda x, y: jnp.where(x > 0, x, jnp.expm1(x)),
    "one root": lambda x, y: x * x - 0.5 * x,
    "sum and difference": lambda x, y: nn.relu(x) + y - jnp.tanh(y * 0),
    "product": lambda x, y: x * nn.sigmoid(y),
    "gate of an image": gated,
    "positions": lambda x, y: x + POSITIONS,
    "scaled positions": lambda x, y: x * POSITIONS[..., :1],
    "dropout": lambda x, y: nn.Dropout(0.4, deterministic=False).apply(
        {}, x, rngs={"dropout": KEY}
    ),
    "stochastic depth": stochastic_depth,
    "noise": lambda x, y: x + 0.5 * jax.random.normal(KEY, x.shape),
    "conv": lambda x, y: conv(x, strides=(2, 1)) + PER_CHANNEL[0],
    "depthwise": lambda x, y: conv(x, KERNEL[..., :1, :4], feature_group_count=4),
    "transposed": lambda x, y: conv(x, padding=((1, 2), (2, 1)), lhs_dilation=(2, 2)),
    "padding before a conv": pre_padded,
    "channels first": channels_first,
    "1-D": lambda x, y: nn.Conv(
        3, (3,), kernel_init=lambda *_: KERNEL[0, :, :, :3]
    ).apply({"params": {"kernel": KERNEL[0, :, :, :3], "bias": np.ones(3, "f")}}, x),
    "dense": lambda x, y: x @ ROWS[:4, :7],
    "kernel on the left": lambda x, y: jnp.einsum("dc,nhwc->nhwd", ROWS[:7, :4], x),
    "flat": lambda x, y: x.reshape(SHAPE[0], -1) @ ROWS[:4].reshape(-1, 2)[:96, :],
    "mixing positions": lambda x, y: jnp.einsum("nhwc,hk->nkwc", x, ROWS[:4, :3]),
    "taken positions": lambda x, y: jnp.take(x, np.array([0, 0, 2]), axis=1),
    "joined channels": lambda x, y: jnp.concatenate([x, 2 * y], -1),
    "joined positions": lambda x, y: jnp.concatenate([x, y, y], 1),
    "split": lambda x, y: jnp.split(x, 2, -1)[1],
    "some channels": lambda x, y: x[:, 1:, ::2, 1:4],
    "reversed": lambda x, y: x[..., ::-1],
    "padded channels": lambda x, y: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 2))),
    "padded": lambda x, y: jnp.pad(
        x, ((0, 0), (1, 0), (0, 2), (0, 0)), constant_values=1.0
    ),
    "wrapped": lambda x, y: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap"),
    "one channel": lambda x, y: x * y[..., :1],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_moments(name):
    keys = jax.random.split(jax.random.key(3), 2)
    x, y = (draw(key, s) for key, s in zip(keys, (STATE, OTHER)))
    value, state, axis = believe(PROGRAMS[name], (x, STATE), (y, OTHER))
    assert state is not None, axis
    value = np.moveaxis(np.float64(value), axis, -1).reshape(-1, value.shape[axis])
    mean, var = np.mean(value, 0), np.var(value, 0)
    np.testing.assert_allclose(state.var, var, rtol=0.05, atol=0.01)
    np.testing.assert_array_less(np.abs(state.mean - mean), 0.03 * np.sqrt(var) + 0.01)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (lambda x, y: x.mean((1, 2)), "reduce_sum.*positions"),
        (lambda x, y: x - x.mean(-1, keepdims=True), "reduce_sum.*channels"),
        (lambda x, y: jnp.maximum(x, y), "max.*several signals"),
        (lambda x, y: x / y, "div.*quotient"),
        (lambda x, y: jnp.einsum("nhwc,nhwd->ncd", x, y), "dot"),
        (lambda x, y: x.reshape(*SHAPE[:3], 2, 2), "reshape.*splits the channels"),
        (lambda x, y: jnp.sort(x, 1), "sort.*no rule"),
        (lambda x, y: x + np.ones(SHAPE, "f"), "add.*nothing is known"),
    ],
)
def test_what_loses_a_state_is_said(program, why):
    given = [(jnp.zeros(SHAPE), STATE), (jnp.zeros(SHAPE), OTHER)]
    *_, belief = believe(program, *given)
    assert isinstance(belief, Lost)
    assert "test_rules.py:" in belief.at
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(belief.at)


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize("include", [True, False])
def test_average_pool_is_that_of_the_layer(padding, include):
    """All values inside of a window go together; a window at the border has fewer."""

    def pool(x):
        return nn.avg_pool(x, (3, 3), (2, 2), padding, include)

    x = jnp.broadcast_to(STATE.mean, SHAPE)
    _, state, _ = believe(pool, (x[:1], STATE))
    if include and padding == "SAME":
        share = np.asarray(pool(jnp.ones((1, 4, 6, 1))), np.float64)
        np.testing.assert_allclose(state.mean, STATE.mean * share.mean(), rtol=1e-5)
        second = (STATE.var + STATE.mean**2) * np.mean(share**2)
        np.testing.assert_allclose(state.var, second - state.mean**2, rtol=1e-4)
    else:
        np.testing.assert_allclose(state.mean, STATE.mean, rtol=1e-5)
        np.testing.assert_allclose(state.var, STATE.var, rtol=1e-5)


@pytest.mark.parametrize("method", ["nearest", "bilinear"])
def test_resize_weighs_neighbours_that_go_together(method):
    x = jnp.broadcast_to(STATE.mean, SHAPE)[:1]
    resize = lambda x: jax.image.resize(x, (1, 2, 12, 4), method)  # noqa: E731
    value, state, _ = believe(resize, (x, STATE))
    np.testing.assert_allclose(state, STATE, rtol=1e-6)
    np.testing.assert_allclose(value[0, 0, 0], STATE.mean, rtol=1e-5)


def test_max_pool_observes_afresh():
    x = draw(KEY, STATE)[:2]
    value, state, _ = believe(lambda x: nn.max_pool(x, (2, 2)), (x, STATE))
    np.testing.assert_allclose(state, kf.filter.observe(value), rtol=1e-6)


def test_a_rule_of_ones_own():
    """Takes the place of the table's, for any primitive."""

    def program(x):
        return jnp.cumsum(x, 1)

    x = draw(KEY, STATE)
    assert isinstance(believe(program, (x, STATE))[2], Lost)

    @kf.register_rule("cumsum")
    def cumsum(op):
        known = op.only()
        steps = jnp.arange(1.0, 5.0)
        var = known.state.var * steps.mean() + known.state.mean**2 * steps.var()
        state = kf.KalmanState(known.state.mean * steps.mean(), var)
        return Known.of(state, known.axis, like=[known])

    try:
        value, state, _ = believe(program, (x, STATE))
    finally:
        del RULES["cumsum"]
    np.testing.assert_allclose(state.var, jnp.var(value, (0, 1, 2)), rtol=0.05)
    with pytest.raises(ValueError, match="register_rule"):
        kf.register_rule(3, cumsum)
