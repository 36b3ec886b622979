"""Where a padded canvas holds real pixels, and how layers move that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kalman_flax._filter.geometry import Axis, Padding

#: paddings that look at the other end of the canvas, or back from it
_OF_THE_CANVAS = ("CIRCULAR", "REFLECT")


def fit(valid: Any, shape: Sequence[int]) -> jax.Array:
    """Returns `valid` as ``[..., *map, 1]``, for a value of `shape`.

    Raises:
        ValueError: it is not bool, or not of that shape, nor broadcastable to it.
    """
    expected = (*shape[:-1], 1)
    found, dtype = jnp.shape(valid), jnp.result_type(valid)
    is_bool = jnp.issubdtype(dtype, jnp.bool_)
    if not is_bool or found[-1:] != (1,) or not _broadcasts(found, expected):
        raise ValueError(
            f"valid is {dtype} of shape {found}, beside a value of shape"
            f" {tuple(shape)}; expected bool of shape {expected}, or 1 along any axis."
        )
    return jnp.broadcast_to(valid, expected)


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    try:
        return jnp.broadcast_shapes(shape, to) == tuple(to)
    except ValueError:
        return False


def both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """Where `a` and `b` are valid; None says nothing, and leaves it to the other.

    Raises:
        ValueError: they are of two shapes.
    """
    if a is None or b is None:
        return b if a is None else a
    if a is not b and a.shape != b.shape:
        raise ValueError(
            f"two signals are valid at different positions: of shape {a.shape} and"
            f" {b.shape}; expected one shape. Take valid=None of the one that counts"
            " everywhere: signal.replace(valid=None)."
        )
    return a if a is b else a & b


def somewhere(valid: jax.Array, axes: Any) -> jax.Array:
    """`valid`, but true all over `axes` where it is false all over them: padding alone
    has the mean of its zeros then, where there would be none."""
    return valid | ~jnp.any(valid, axes, keepdims=True)


def mean(value: jax.Array, valid: jax.Array | None, axis: Any, **options: Any) -> Any:
    """`jnp.mean` over what is valid; 0 where nothing is."""
    if valid is None:
        return jnp.mean(value, axis, **options)
    where = somewhere(jnp.broadcast_to(valid, value.shape), axis)
    return jnp.mean(value, axis, where=where, **options)


def slid(valid: jax.Array, axes: Sequence[Axis], padding: Padding) -> jax.Array:
    """Where the output of a window is valid: where an output would be had the map ended
    where its valid part does, with the same zeros around it.

    With half a window of zeros on either side that is where the centre of the window
    is valid, ``valid[:, ::s, ::s]``; without zeros, where all of the window is.

    Args:
        valid: ``[..., *map, 1]``.
        axes: the window along each axis of the map, as `slide` returns it.
        padding: as it was given.

    Raises:
        ValueError: a padding with values of the map.
    """
    if isinstance(padding, str) and padding.upper() in _OF_THE_CANVAS:
        raise ValueError(
            f"padding is {padding!r}, which takes values from the end of the canvas,"
            ' not of what is valid; take "SAME", "VALID" or numbers.'
        )
    for number, axis in enumerate(axes, valid.ndim - 1 - len(axes)):
        valid = _slid_along(valid, number, axis)
    return valid


def _slid_along(valid: jax.Array, number: int, axis: Axis) -> jax.Array:
    """The same along the axis `number`."""
    (before, after), between = axis.padding, axis.input_dilation
    dilated = (axis.size - 1) * between + 1
    outputs = (dilated + before + after - axis.span) // axis.stride + 1
    # Of a map from a to b an output comes from `first` >= a on, while `last` <= b.
    first = np.arange(outputs) * axis.stride
    last = first + axis.span - 1 - before - after
    first, last = first // between, -(-last // between)
    ends = [
        jnp.take(valid, np.clip(end, 0, axis.size - 1), number) for end in (first, last)
    ]
    inside = np.all(first <= last)
    return ends[0] & ends[1] if inside else ends[0] | ends[1]
