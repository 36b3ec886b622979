"""What every normaliser refuses: attributes that mean nothing, and inputs that have no
statistics. One place for all of them, ours and those we compare with."""

from __future__ import annotations

import functools
import math
import numbers
import sys
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import flax
import jax
import jax.numpy as jnp
import numpy as np

from kalman_flax._filter.observe import count_values
from kalman_flax.layers.signal import Signal, as_signal

#: of the attributes that several normalisers have: the lowest and the highest value
RANGES = {
    "epsilon": (0.0, math.inf),
    "momentum": (0.0, 1.0),
    "gain": (0.0, 1.0),
    "outlier_ratio": (0.0, math.inf),
    "decay_steps": (1, math.inf),
    "micro_batch_size": (1, math.inf),
    "num_groups": (1, math.inf),
    "group_size": (1, math.inf),
}


class Checked:
    """Mixin of every normaliser: checks its attributes at construction, and inputs.

    An attribute has to be of its annotation, where that is made of bool, int, float,
    Literal and None, and within `RANGES` and the class's own `ranges`; ``axis`` may be
    given as a tuple of one, as `nn.BatchNorm` takes it.
    """

    #: like `RANGES`, of attributes of this class alone
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}

    # What the module has that mixes this in.
    is_initializing: Callable[[], bool]

    def __post_init__(self) -> None:
        axis = getattr(self, "axis", None)
        if isinstance(axis, Sequence) and len(axis) == 1:
            self.axis = axis[0]
        owner, ranges = type(self).__name__, RANGES | dict(self.ranges)
        for name, kinds in _kinds(type(self)).items():
            value = getattr(self, name)
            try:
                _check_kind(value, kinds)
                _check_range(value, *ranges.get(name, (-math.inf, math.inf)))
            except ValueError as error:
                raise ValueError(f"{owner}.{name} is {value!r}; {error}.") from None
        for name in {"dtype", "param_dtype"} & vars(self).keys():
            value = getattr(self, name)
            if not _is_float(value, optional=name == "dtype"):
                raise ValueError(
                    f"{owner}.{name} is {value!r}; expected a floating-point dtype,"
                    " e.g. jnp.float32."
                )
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue]

    def _value(self, x: Signal | jax.Array) -> jax.Array:
        """The value of `x`, all of which counts.

        Raises:
            ValueError: it is complex, or has no such axis; not all of it is valid.
        """
        if isinstance(x, Signal) and x.valid is not None:
            raise ValueError(
                f"{type(self).__name__} got a Signal that is valid in places, but"
                " cannot leave the others out of what it observes; take a normaliser"
                " whose call has a mask, or signal.replace(valid=None) where zeros may"
                " count."
            )
        return self._masked(x, None)[0]

    def _masked(
        self, x: Signal | jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """The value of `x` and what of it counts: where `mask` is true, and it is
        valid.

        Where a mask hides what is infinite or NaN, it is 0: that does not count, but 0
        times it would be NaN in the gradients.

        Raises:
            ValueError: it is complex, or has no such axis; or not all is valid, but
                the channels are not last.
        """
        signal = as_signal(x)
        value = jnp.asarray(signal.value)
        owner, axis = type(self).__name__, getattr(self, "axis", -1)
        if jnp.iscomplexobj(value):
            raise ValueError(
                f"{owner} got {value.dtype} values, but normalises real ones; take real"
                " and imaginary parts as channels."
            )
        if not -value.ndim <= axis < value.ndim:
            raise ValueError(
                f"{owner}.axis is {axis}, but the activation has shape {value.shape};"
                " give the axis of its channels, usually -1."
            )
        if mask is not None:
            mask = jnp.broadcast_to(jnp.asarray(mask, bool), value.shape)
            value = jnp.where(mask | jnp.isfinite(value), value, 0)
        if signal.valid is None:
            return value, mask
        if axis not in (-1, value.ndim - 1):
            raise ValueError(
                f"{owner}.axis is {axis}, but a Signal that is valid in places has its"
                " channels last; leave axis out."
            )
        return value, signal.valid if mask is None else mask & signal.valid

    def _check_batch(self, value: jax.Array, *, alone: bool = True) -> None:
        """Looks whether a micro-batch can have statistics, as far as its shape tells.

        Args:
            value: what they are taken of.
            alone: they are all that is normalised by; with a prediction, one value a
                channel is enough.

        Raises:
            ValueError: it has no values.
        """
        axis = getattr(self, "axis", -1) % value.ndim
        if getattr(self, "axis_name", None) is not None and not self.is_initializing():
            return  # how many there are in all is not known
        count = count_values(value.shape, [i for i in range(value.ndim) if i != axis])
        if count == 1 and alone and not self.is_initializing():
            name = "/".join(getattr(self, "path", ()))
            warnings.warn(
                f"{type(self).__name__} {name!r} trains on one value a channel, an"
                f" activation of shape {value.shape}: its mean is the value itself and"
                " its variance 0, so that all inputs give one output, and gradients"
                " are 0. Take micro-batches of two or more, share statistics by"
                " axis_name, or use a normaliser of each example's groups.",
                stacklevel=_level_of_user(),
            )


@functools.cache
def _kinds(cls: type) -> dict[str, tuple[Any, ...]]:
    """The members of the annotations that can be checked, by the attribute's name."""
    hints = typing.get_type_hints(cls)
    kinds = {}
    for name in getattr(cls, "__dataclass_fields__", {}):
        hint = hints[name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        members = typing.get_args(hint) if union else (hint,)
        if all(_checkable(member) for member in members):
            kinds[name] = members
    return kinds


def _checkable(kind: Any) -> bool:
    simple = kind in (bool, int, float, type(None))
    return simple or typing.get_origin(kind) is Literal


def _check_kind(value: Any, kinds: Sequence[Any]) -> None:
    """Raises a ValueError that says what was expected unless `value` is of a kind."""
    expected = []
    for kind in kinds:
        if kind is type(None):
            is_one, text = value is None, "None"
        elif kind is bool:
            is_one, text = isinstance(value, bool | np.bool_), "True or False"
        elif kind is int:
            is_one, text = _is_number(value, numbers.Integral), "a whole number"
        elif kind is float:
            is_one, text = _is_number(value, numbers.Real), "a number"
        else:
            choices = typing.get_args(kind)
            is_one = isinstance(value, str) and value in choices
            text = f"one of {list(choices)}"
        if is_one:
            return
        expected.append(text)
    raise ValueError(f"expected {' or '.join(expected)}")


def _is_number(value: Any, kind: type) -> bool:
    """Not true or false; an array of one is known when it runs."""
    if isinstance(value, jax.Array | np.ndarray):
        return value.ndim == 0 and value.dtype != bool
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_range(value: Any, low: float, high: float) -> None:
    """Raises a ValueError unless a number is in the range; NaN never is."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return
    if not low <= value <= high or not math.isfinite(value):
        end = f"{high:g}]" if math.isfinite(high) else "inf)"
        start = f"[{low:g}" if math.isfinite(low) else "(-inf"
        whole = "a whole number" if isinstance(low, int) else "a number"
        raise ValueError(f"expected {whole} in {start}, {end}")


def _is_float(dtype: Any, *, optional: bool) -> bool:
    if dtype is None:
        return optional
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


_LIBRARIES = (
    str(Path(__file__).parents[1]),
    *(str(Path(library.__file__ or "").parent) for library in (jax, flax)),
)


def _level_of_user() -> int:
    """The `stacklevel` of the first caller outside of the libraries."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    return level
