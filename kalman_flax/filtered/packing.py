"""Operands as arrays and what is static of them, to pass the border of a transform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kalman_flax._filter.state import KalmanState, for_channels
from kalman_flax.filtered.belief import Known, Lost, Operand


class Of(NamedTuple):
    """A known operand's static part: its channel axis, and what it came through."""

    axis: int | None
    through: tuple[str, ...] = ()


Kind = Of | Lost | None


def kind_of(operand: Operand) -> Kind:
    """The static part of what is believed of an operand."""
    belief = operand.belief
    return Of(belief.axis, belief.through) if isinstance(belief, Known) else belief


def meet(a: Kind, b: Kind, at: str) -> Kind:
    """What holds of an operand that is `a` or `b`, such as one of two branches'."""
    if isinstance(a, Lost):
        return a
    if isinstance(b, Lost):
        return b
    if a is None and b is None:
        return None
    if a is None or b is None:
        return Lost(f"{at}: it has a state here and none there")
    if a.axis is None or b.axis is None or a.axis == b.axis:
        return Of(b.axis if a.axis is None else a.axis, a.through)
    return Lost(f"{at}: the channels are at axis {a.axis} here and at {b.axis} there")


def pack(operands: Sequence[Operand], kinds: Sequence[Kind]) -> tuple[Any, Any]:
    """Values and states: arrays of shapes that follow from the values' and `kinds`."""
    states = [
        _state(x, kind.axis) if isinstance(kind, Of) else None
        for x, kind in zip(operands, kinds)
    ]
    return [x.value for x in operands], states


def _state(operand: Operand, axis: int | None) -> KalmanState:
    assert isinstance(operand.belief, Known)
    state = KalmanState(*(jnp.asarray(s, jnp.float32) for s in operand.belief.state))
    if axis is None:
        return state
    return for_channels(state, np.shape(operand.value)[axis])


def unpack(arrays: tuple[Any, Any], kinds: Sequence[Kind]) -> list[Operand]:
    """The inverse of `pack`: with states that are roots of their own."""
    return [
        Operand(value, _belief(state, kind))
        for value, state, kind in zip(*arrays, kinds)
    ]


def _belief(state: KalmanState | None, kind: Kind) -> Known | Lost | None:
    if not isinstance(kind, Of):
        return kind
    assert state is not None  # as `pack` has it for each `Of`
    known = Known.of(state, kind.axis)
    known.through = kind.through
    return known
