"""Rules of elementwise operations: of one signal, and of independent ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kalman_flax._filter.mixture import predict_mixture
from kalman_flax._filter.predict import (
    predict_affine,
    predict_product,
    predict_relu,
    predict_sum,
)
from kalman_flax._filter.state import KalmanState
from kalman_flax.filtered.belief import Belief, Known, Operand
from kalman_flax.filtered.operation import (
    Operation,
    Unknown,
    as_gate,
    as_signal,
    per_channel,
)

Independent = Callable[..., KalmanState]


def _difference(a: KalmanState, b: KalmanState) -> KalmanState:
    return predict_sum(a, predict_affine(b, -1.0, 0.0))


def _select(which: KalmanState, *cases: KalmanState) -> KalmanState:
    """By a condition that is independent of the cases, such as dropout's."""
    if len(cases) != 2:
        raise Unknown("a choice among more than two")
    return predict_mixture(cases, (1.0 - which.mean, which.mean))


#: by primitive, the state of the result where the operands are independent
INDEPENDENT: dict[str, Independent] = {
    "add": predict_sum,
    "add_any": predict_sum,
    "sub": _difference,
    "mul": predict_product,
    "select_n": _select,
}


def elementwise(op: Operation) -> Known:
    """Operands that follow from one root: one pointwise function of it. Else those that
    can be taken as independent: by `INDEPENDENT`."""
    known = op.known
    if len({id(x.root) for x in known}) == 1:
        axis = op.axis()
        axis = _promoted(op) if axis is None else axis
        constants = [
            None if isinstance(x.belief, Known) else _constant(x, axis, op.ndim)
            for x in op.operands
        ]
        if all(
            isinstance(x.belief, Known) or c is not None
            for x, c in zip(op.operands, constants)
        ):
            return _of_one_root(op, constants, axis)
    return _of_independent(op)


def _constant(operand: Operand, axis: int | None, ndim: int) -> jax.Array | None:
    if operand.belief is not None:  # lost
        return None
    return per_channel(operand, axis, ndim)


def _promoted(op: Operation) -> int | None:
    """Where every channel is alike: the axis along which the constants differ."""
    axes = {
        axis
        for x in op.operands
        if x.belief is None
        for axis, size in enumerate(np.shape(x.small))
        if size > 1
    }
    return axes.pop() if len(axes) == 1 and (axes != {0} or op.ndim == 1) else None


def _of_one_root(
    op: Operation, constants: Sequence[jax.Array | None], axis: int | None
) -> Known:
    operands: list[Any] = [x.belief for x in op.operands]  # Known where not constant
    first = op.known[0]

    def fn(nodes: jax.Array) -> jax.Array:
        return op.evaluate(
            *(
                x.value_at(nodes) if c is None else c[..., None] if c.ndim else c
                for x, c in zip(operands, constants)
            )
        )

    through = tuple(dict.fromkeys(name for x in op.known for name in x.through))
    result = Known(
        first.root, fn, lambda: first.root.moments(fn), axis, False, through=through
    )
    slope_and_offset = _affine(op, constants)
    if slope_and_offset is not None:
        slope, offset = slope_and_offset
        result.move = lambda: predict_affine(first.state, slope, offset)
        result.affine = first.affine
    elif first.affine and _is_relu(op):
        result.move = lambda: predict_relu(first.state)
    return result


def _affine(
    op: Operation, constants: Sequence[jax.Array | None]
) -> tuple[jax.Array | float, jax.Array | float] | None:
    """Slope and offset of ``slope x + offset``, if it is that of the known operand."""
    match op.name, constants:
        case "neg", [None]:
            return -1.0, 0.0
        case (("add" | "add_any"), ([None, c] | [c, None])) if c is not None:
            return 1.0, c
        case "sub", [None, c] if c is not None:
            return 1.0, -c
        case "sub", [c, None] if c is not None:
            return -1.0, c
        case "mul", ([None, c] | [c, None]) if c is not None:
            return c, 0.0
        case "div", [None, c] if c is not None:
            return 1.0 / c, 0.0
    return None


def _is_relu(op: Operation) -> bool:
    """max(x, 0), with the literal 0."""
    if op.name != "max":
        return False
    bounds = [x.small for x in op.operands if x.belief is None]
    return len(bounds) == 1 and all(
        isinstance(c, (int, float, np.ndarray, np.generic)) and not np.any(c)
        for c in bounds
    )


def _of_independent(op: Operation) -> Known:
    if op.name not in INDEPENDENT and op.name != "div":
        raise Unknown("no rule for several signals")
    axis, like = op.axis(), op.known
    if op.name in ("mul", "div") and (scaled := _scaled_by_position(op, axis)):
        return scaled
    if op.name == "div":
        raise Unknown("no rule for the quotient of two signals")
    signal = as_gate if op.name == "mul" else as_signal
    states = [signal(x, axis, op.outputs[0].shape) for x in op.operands]
    state = INDEPENDENT[op.name](*states)
    return Known.of(state, axis if state.mean.ndim else None, like=like)


def _scaled_by_position(op: Operation, axis: int | None) -> Known | None:
    """A signal times or over a constant that depends on the position alone: the mean
    over windows that overlap the border is a sum over a number of values."""
    x, other = op.operands
    if op.name == "mul" and x.belief is None:
        x, other = other, x
    if not isinstance(x.belief, Known) or other.belief is not None:
        return None
    factor = jnp.asarray(other.small, jnp.float32)
    if factor.ndim != op.ndim or (axis is not None and factor.shape[axis] > 1):
        return None
    if factor.shape[0] > 1 and factor.shape == op.outputs[0].shape:
        return None
    state, before = x.belief.base or (x.belief.state, 1.0)
    factor = before * factor if op.name == "mul" else before / factor
    moved = predict_product(state, KalmanState(jnp.mean(factor), jnp.var(factor)))
    return Known.of(moved, axis, like=[x.belief], base=(state, factor))


def same(op: Operation) -> list[Belief]:
    """What is the same to a state: casts between floats, copies, barriers, names."""
    return [
        x.belief.replace(base=x.belief.base, unpadded=x.belief.unpadded)
        if isinstance(x.belief, Known)
        else x.belief
        for x in op.operands
    ]


def cast(op: Operation) -> Known:
    """To a float: the same values. Else a function that rounds."""
    known = op.only()
    if not jnp.issubdtype(op.params["new_dtype"], jnp.floating):
        return elementwise(op)

    def fn(nodes: jax.Array) -> jax.Array:
        return jnp.asarray(known.value_at(nodes), jnp.float32)

    return known.replace(fn=fn, base=known.base, unpadded=known.unpadded)


def stop_gradient(op: Operation) -> Known:
    """The state has no gradient either."""
    known = op.only()
    state = known.state
    return known.replace(
        fn=lambda nodes: lax.stop_gradient(known.value_at(nodes)),
        move=lambda: KalmanState(*map(lax.stop_gradient, state)),
    )
