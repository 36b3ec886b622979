"""An activation with what the filter believes of it, and how layers move both."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from kalman_flax._filter.predict import (
    predict_affine,
    predict_pointwise,
    predict_product,
    predict_sum,
)
from kalman_flax._filter.state import KalmanState, for_channels
from kalman_flax.layers import valid as validity
from kalman_flax.layers.channels import per_channel, picked_channels

_WHAT_IT_IS = (
    "an activation with its Kalman state, not an array. Layers that move both have"
    " Flax's names in kalman_flax: kf.Conv, kf.Dense, kf.relu, kf.max_pool, kf.Dropout,"
    " kf.concatenate and so on, and kf.activation(fn) for any other pointwise function;"
    " where the filter is to end, take the array: signal.value"
)

_FIELDS = ("value", "state", "valid")


class _SaysWhatItIs(type):
    """Has the errors of JAX and Flax, which print the type that came, say more."""

    def __repr__(cls) -> str:
        return f"<class '{cls.__module__}.{cls.__qualname__}', {_WHAT_IT_IS}>"


@dataclasses.dataclass(frozen=True, eq=False)
class Signal(metaclass=_SaysWhatItIs):
    """What travels through a network: a value and its state.

    It has the shape, dtype and indexing of its value, and these operators, which move
    the state exactly:

    - ``a + b``, ``a - b``, ``a * b`` of two Signals, taken as independent of each other
      (but ``a * a``, of one and the same, is a function of it);
    - ``+ - * /`` with a constant: a number, or an array of one number a channel;
    - ``-a``, ``a.astype(dtype)``, ``a[...]`` and ``a.reshape(...)``, as long as the
      last axis still tells the channels.

    Behind any other, as with an array of the value's own shape, the state is unknown.

    Attributes:
        value: the activation, ``[..., *map, C]``, channels last.
        state: the moments of `value`, float32 ``[..., C]``; floats are filled up to
            that shape. None where nothing is known, so that the next normaliser relies
            on what it observes alone.
        valid: where the value counts, bool ``[..., *map, 1]``, for images of several
            sizes on one canvas, or slots that are not all filled; None: everywhere.
            Elsewhere the value is set to 0, whatever it was, and its gradient is 0.
            Statistics leave it out, convolutions see zeros as around a map, and so the
            valid part is what the map without the canvas gives. (But the share of the
            border by which `Conv` predicts is that of the canvas, off by O(1 / H) of
            the mean.) What cannot move it along raises an error.

    Raises:
        ValueError: a state that is neither a `KalmanState` nor None; a `valid` of
            another shape or dtype.
    """

    value: jax.Array
    state: KalmanState | None = None
    valid: jax.Array | None = None

    __array_ufunc__ = None  # so that `array + signal` of NumPy comes to __radd__
    __iter__ = None  # it is no sequence, though it has __getitem__

    def __post_init__(self):
        shape = getattr(self.value, "shape", ())
        if self.valid is not None and shape:
            valid = validity.fit(self.valid, shape)
            value = jnp.where(valid, self.value, jnp.zeros((), self.dtype))
            object.__setattr__(self, "valid", valid)
            object.__setattr__(self, "value", value)
        if self.state is None or not shape:
            return
        if not isinstance(self.state, tuple) or not hasattr(self.state, "var"):
            raise ValueError(
                f"the state of a Signal is {self.state!r}; expected a KalmanState, or"
                " None where nothing is known."
            )

        def fill(stat: Any) -> Any:
            if isinstance(stat, (int, float)) or getattr(stat, "shape", None) == ():
                return jnp.full(shape[-1:], stat, jnp.float32)
            return stat

        mean, var = fill(self.state.mean), fill(self.state.var)
        object.__setattr__(self, "state", self.state._replace(mean=mean, var=var))

    def replace(self, **changes: Any) -> Signal:
        """Returns a Signal with another value, state or `valid`."""
        return dataclasses.replace(self, **changes)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError(f"a Signal is {_WHAT_IT_IS}.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return jnp.shape(self.value)

    @property
    def ndim(self) -> int:
        """Of the value."""
        return jnp.ndim(self.value)

    @property
    def size(self) -> int:
        """Of the value."""
        return jnp.size(self.value)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the value; the state is float32."""
        return jnp.result_type(self.value)

    def astype(self, dtype: Any) -> Signal:
        """The value in another dtype; the state is that of real numbers."""
        real = jnp.issubdtype(dtype, jnp.floating)
        state = self.state if real else None
        return Signal(self.value.astype(dtype), state, self.valid)

    def mean(self, axis: Any = None, *, keepdims: bool = False) -> Signal:
        """`jnp.mean` of what is valid; ends the filter, see `global_avg_pool`, and
        `valid`."""
        return Signal(validity.mean(self.value, self.valid, axis, keepdims=keepdims))

    def reshape(self, *shape: Any) -> Signal:
        """The value in another shape. A last axis of whole positions, as of ``(N, -1)``
        before a dense layer, repeats the state for each.

        Raises:
            ValueError: the last axis is another, and not all positions are valid.
        """
        value, valid = self.value.reshape(*shape), self.valid
        if valid is not None:
            _check_channels(value.shape[-1:] == self.shape[-1:], f"reshape{shape}")
            valid = valid.reshape(*value.shape[:-1], 1)
        return Signal(value, self._reshaped_state(value.shape), valid)

    def _reshaped_state(self, shape: tuple[int, ...]) -> KalmanState | None:
        if self.state is None or not shape or shape[-1] % self.shape[-1]:
            return None
        of_examples = self.state.mean.ndim > 1
        if of_examples and (shape[:1], shape[-1:]) != (self.shape[:1], self.shape[-1:]):
            return None
        repeats = shape[-1] // self.shape[-1]
        return jax.tree.map(lambda stat: jnp.tile(stat, repeats), self.state)

    def __getitem__(self, index: Any) -> Signal:
        parts = index if isinstance(index, tuple) else (index,)
        value, valid = self.value[index], self.valid
        if valid is not None:
            kept = picked_channels(parts, self.ndim) is not None
            _check_channels(kept, f"the index {index}")
            valid = jnp.broadcast_to(valid, self.shape)[index][..., :1]
        return Signal(value, self._indexed_state(parts), valid)

    def _indexed_state(self, parts: tuple) -> KalmanState | None:
        channels = picked_channels(parts, self.ndim)
        if self.state is None or channels is None:
            return None
        of_examples = self.state.mean.ndim > 1
        if of_examples and not (parts and parts[0] in (Ellipsis, slice(None))):
            return None
        return jax.tree.map(lambda stat: stat[..., channels], self.state)

    def __neg__(self) -> Signal:
        return self * -1.0

    def __add__(self, other: Any) -> Signal:
        return self._combine(
            other, operator.add, predict_sum, lambda s, c: predict_affine(s, 1.0, c)
        )

    __radd__ = __add__

    def __sub__(self, other: Any) -> Signal:
        return self._combine(
            other,
            operator.sub,
            lambda a, b: predict_sum(a, predict_affine(b, -1.0, 0.0)),
            lambda s, c: predict_affine(s, 1.0, -c),
        )

    def __rsub__(self, other: Any) -> Signal:
        return -self + other

    def __mul__(self, other: Any) -> Signal:
        return self._combine(
            other, operator.mul, predict_product, lambda s, c: predict_affine(s, c, 0.0)
        )

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Signal:
        return self._combine(
            other,
            operator.truediv,
            lambda a, b: None,  # nothing is known of 1 / b, which may be near 0
            lambda s, c: predict_affine(s, 1.0 / c, 0.0),
        )

    def __rtruediv__(self, other: Any) -> Signal:
        return Signal(other / self.filled(1), valid=self.valid)

    def filled(self, fill: float) -> jax.Array:
        """Returns the value, with `fill` in the place of 0 where it is not valid."""
        if self.valid is None:
            return self.value
        return jnp.where(self.valid, self.value, jnp.asarray(fill, self.dtype))

    def _combine(
        self,
        other: Any,
        operate: Callable[[Any, Any], jax.Array],
        of_signals: Callable[[KalmanState, KalmanState], KalmanState | None],
        of_constant: Callable[[KalmanState, jax.Array], KalmanState],
    ) -> Signal:
        """``operate(self, other)``, by one rule for Signals, another for constants."""
        if not isinstance(other, Signal):
            value, state = operate(self.value, other), None
            constant = per_channel(other, self.shape)
            if self.state is not None and constant is not None:
                state = of_constant(for_channels(self.state, self.shape[-1]), constant)
            return Signal(value, state, self.valid)
        # Not 0, by which it might divide.
        value = operate(self.value, other.filled(1))
        result = Signal(value, valid=validity.both(self.valid, other.valid))
        if self.state is None or other.state is None:
            return result
        mine = for_channels(self.state, self.shape[-1])
        if other is self:
            of_one = lambda x: operate(x, x)  # noqa: E731
            return result.replace(state=predict_pointwise(mine, of_one))
        yours = for_channels(other.state, other.shape[-1])
        return result.replace(state=of_signals(mine, yours))


jax.tree_util.register_pytree_with_keys(
    Signal,
    lambda x: (
        [(jax.tree_util.GetAttrKey(name), getattr(x, name)) for name in _FIELDS],
        _WHAT_IT_IS,  # for the errors of functions that take trees, as nn.max_pool does
    ),
    lambda _, children: _unflattened(*children),
)


def _unflattened(*children: Any) -> Signal:
    """A Signal of whatever JAX puts in the place of arrays, as it is."""
    signal = object.__new__(Signal)
    for name, child in zip(_FIELDS, children):
        object.__setattr__(signal, name, child)
    return signal


def _check_channels(kept: bool, what: str) -> None:
    """Refuses what lets the last axis be another than that of the channels."""
    if not kept:
        raise ValueError(
            f"{what} mixes channels with positions, not all of which are valid; take"
            " the mean of the valid ones first, or signal.replace(valid=None) where"
            " zeros may count."
        )


#: the type of an input that is the type of the output, too
SignalOrArray = TypeVar("SignalOrArray", bound=Signal | jax.Array)


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
    x: SignalOrArray,
    move_value: Callable[[jax.Array], jax.Array],
    predict: Callable[[KalmanState], KalmanState | None],
    move_valid: Callable[[jax.Array], jax.Array] = lambda valid: valid,
) -> SignalOrArray:
    """Moves the value by `move_value` and, where they are known, the state by `predict`
    and what is valid by `move_valid`.

    The contract of every predicting layer: a Signal gives a Signal, a plain array a
    plain array, and an unknown state stays unknown. `predict` gives None where it has
    no answer.
    """
    if not isinstance(x, Signal):
        return move_value(x)
    state = state_of(x)
    value = move_value(x.value)  # first: it makes the parameters that predict reads
    moved = None if state is None else predict(state)
    valid = None if x.valid is None else move_valid(x.valid)
    return Signal(value, moved, valid)  # pyright: ignore[reportReturnType]  # as x is


def map_size(x: Signal | jax.Array, window: int | Sequence[int]) -> tuple[int, ...]:
    """The size of the map that a window moves over: ``*map`` of ``[..., *map, C]``.

    Raises:
        ValueError: too few axes for the window.
    """
    shape = jnp.shape(x.value if isinstance(x, Signal) else x)
    rank = 1 if isinstance(window, int) else len(window)
    if len(shape) <= rank:
        raise ValueError(
            f"the input has shape {shape} and the window {window}; expected"
            f" [..., *map, C] with {rank} axes of the map."
        )
    return shape[-1 - rank : -1]


def is_concrete(size: Sequence[Any]) -> bool:
    """Whether the sizes are numbers, and not symbols of an export."""
    return all(isinstance(n, int) for n in size)
