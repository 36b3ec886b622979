"""An activation with what the filter believes of it, and how layers move both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp

from kalman_flax._filter.predict import predict_sum
from kalman_flax._filter.state import KalmanState, for_channels


@flax.struct.dataclass
class Signal:
    """What travels through a network: a value and its state.

    Attributes:
        value: the activation, ``[..., H, W, C]``.
        state: the moments of `value`, ``[..., C]``; None where nothing is known, so
            that the next normaliser relies on what it observes alone.

    ``a + b`` adds values and, taking the two as independent, means and variances.
    """

    value: jax.Array
    state: KalmanState | None = None

    __array_ufunc__ = None  # so that `array + signal` of NumPy comes to __radd__

    def __add__(self, other: Signal | jax.Array) -> Signal:
        other = as_signal(other)
        known = self.state is not None and other.state is not None
        return Signal(
            self.value + other.value,
            predict_sum(state_of(self), state_of(other)) if known else None,
        )

    __radd__ = __add__


def as_signal(x: Signal | jax.Array) -> Signal:
    """Returns `x`, as a Signal of unknown state if it is a plain array."""
    return x if isinstance(x, Signal) else Signal(jnp.asarray(x))


def state_of(x: Signal, axis: int = -1) -> KalmanState | None:
    """Returns the state of `x` as float32 ``[..., C]``, or None where it is unknown.

    Args:
        x: a Signal with its channels at `axis`.
        axis: the channel axis.

    Raises:
        ValueError: the state has another number of channels than the value.
    """
    return None if x.state is None else for_channels(x.state, x.value.shape[axis])


def through(
    x: Signal | jax.Array,
    move_value: Callable[[jax.Array], jax.Array],
    predict: Callable[[KalmanState], KalmanState | None],
) -> Signal | jax.Array:
    """Moves the value by `move_value` and, where it is known, the state by `predict`.

    The contract of every predicting layer: a Signal gives a Signal, a plain array a
    plain array, and an unknown state stays unknown. `predict` gives None where it has
    no answer.
    """
    if not isinstance(x, Signal):
        return move_value(x)
    state = state_of(x)
    return Signal(move_value(x.value), None if state is None else predict(state))


def map_size(x: Signal | jax.Array, window: int | Sequence[int]) -> tuple[int, ...]:
    """The size of the map that a window moves over: ``*map`` of ``[..., *map, C]``."""
    shape = jnp.shape(x.value if isinstance(x, Signal) else x)
    rank = 1 if isinstance(window, int) else len(window)
    if len(shape) <= rank:
        raise ValueError(
            f"the input has shape {shape} and the window {window};"
            f" expected [..., *map, C] with {rank} axes of the map."
        )
    return shape[-1 - rank : -1]


def is_concrete(size: Sequence[Any]) -> bool:
    """Whether the sizes are numbers, and not symbols of an export."""
    return all(isinstance(n, int) for n in size)
