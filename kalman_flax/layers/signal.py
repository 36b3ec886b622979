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

_WHAT_IT_IS = (
    "an activation with its Kalman state, not an array. Layers that move both have"
    " Flax's names in kalman_flax: kf.Conv, kf.Dense, kf.relu, kf.max_pool, kf.Dropout,"
    " kf.concatenate and so on, and kf.activation(fn) for any other pointwise function;"
    " where the filter is to end, take the array: signal.value"
)

_FIELDS = ("value", "state")


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

    Raises:
        ValueError: a state that is neither a `KalmanState` nor None.
    """

    value: jax.Array
    state: KalmanState | None = None

    __array_ufunc__ = None  # so that `array + signal` of NumPy comes to __radd__
    __iter__ = None  # it is no sequence, though it has __getitem__

    def __post_init__(self):
        shape = getattr(self.value, "shape", ())
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
        """Returns a Signal with another value or state."""
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
        return Signal(self.value.astype(dtype), self.state if real else None)

    def mean(self, axis: Any = None, *, keepdims: bool = False) -> Signal:
        """`jnp.mean` of the value; ends the filter, see `global_avg_pool`."""
        return Signal(jnp.mean(self.value, axis, keepdims=keepdims))

    def reshape(self, *shape: Any) -> Signal:
        """The value in another shape. A last axis of whole positions, as of ``(N, -1)``
        before a dense layer, repeats the state for each."""
        value = self.value.reshape(*shape)
        return Signal(value, self._reshaped_state(value.shape))

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
        return Signal(self.value[index], self._indexed_state(parts))

    def _indexed_state(self, parts: tuple) -> KalmanState | None:
        channels = _picked_channels(parts, self.ndim)
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
        return Signal(other / self.value)

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
            constant = _per_channel(other, self.shape)
            if self.state is not None and constant is not None:
                state = of_constant(for_channels(self.state, self.shape[-1]), constant)
            return Signal(value, state)
        value = operate(self.value, other.value)
        if self.state is None or other.state is None:
            return Signal(value)
        mine = for_channels(self.state, self.shape[-1])
        if other is self:
            of_one = lambda x: operate(x, x)  # noqa: E731
            return Signal(value, predict_pointwise(mine, of_one))
        return Signal(
            value, of_signals(mine, for_channels(other.state, other.shape[-1]))
        )


jax.tree_util.register_pytree_with_keys(
    Signal,
    lambda x: (
        [(jax.tree_util.GetAttrKey(name), getattr(x, name)) for name in _FIELDS],
        _WHAT_IT_IS,  # for the errors of functions that take trees, as nn.max_pool does
    ),
    lambda _, children: _unflattened(*children),
)


def _unflattened(value: Any, state: Any) -> Signal:
    """A Signal of whatever JAX puts in the place of arrays, as it is."""
    signal = object.__new__(Signal)
    object.__setattr__(signal, "value", value)
    object.__setattr__(signal, "state", state)
    return signal


def _picked_channels(parts: tuple, ndim: int) -> slice | None:
    """Which channels an index picks; None where the last axis is no longer theirs."""

    def is_plain(part: Any) -> bool:
        dtype = getattr(part, "dtype", None)
        return (
            part is None
            or isinstance(part, (int, slice, type(Ellipsis)))
            or (dtype is not None and jnp.issubdtype(dtype, jnp.integer))
        )

    if not all(map(is_plain, parts)):
        return None
    last = parts[-1] if parts else Ellipsis
    dots = any(part is Ellipsis for part in parts)
    named = sum(part is not None and part is not Ellipsis for part in parts)
    if last is Ellipsis or (not dots and named < ndim):
        return slice(None)
    return last if isinstance(last, slice) else None


def _per_channel(constant: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """Returns `constant` as a number or ``[C]``; None where it differs by position, or
    has the value's own shape, as another activation would."""
    of_constant = jnp.shape(constant)
    if of_constant == ():
        return constant
    *positions, channels = of_constant
    alone = len(of_constant) > 1 and of_constant == shape
    if alone or channels not in (1, shape[-1]) or any(n != 1 for n in positions):
        return None
    return jnp.reshape(constant, (channels,))


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
) -> SignalOrArray:
    """Moves the value by `move_value` and, where it is known, the state by `predict`.

    The contract of every predicting layer: a Signal gives a Signal, a plain array a
    plain array, and an unknown state stays unknown. `predict` gives None where it has
    no answer.
    """
    if not isinstance(x, Signal):
        return move_value(x)
    state = state_of(x)
    value = move_value(x.value)  # first: it makes the parameters that predict reads
    moved = None if state is None else predict(state)
    return Signal(value, moved)  # pyright: ignore[reportReturnType]  # as x is


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
