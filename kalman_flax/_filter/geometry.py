"""Where the taps of a window fall: the geometry of convolution and pooling."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from kalman_flax._filter.state import check_choice

PerAxis = int | Sequence[int] | None
Padding = str | int | Sequence[int | tuple[int, int]]
PADDINGS = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")


class Axis(NamedTuple):
    """A window that slides along one axis of a map."""

    taps: int
    size: int  # of the map
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    input_dilation: int = 1
    kernel_dilation: int = 1

    @property
    def span(self) -> int:
        """Positions from the first tap to the last."""
        return (self.taps - 1) * self.kernel_dilation + 1


class Positions(NamedTuple):
    """The distinct positions of a window, as far as its taps see a value or a zero.

    Attributes:
        inside: ``[kinds, taps]``, 1 where the tap falls on a value of the map, 0 where
            on a zero: outside, or put between the values by `input_dilation`.
        share: ``[kinds]``, the share of the output's positions; sums to 1.
    """

    inside: np.ndarray
    share: np.ndarray


def slide(
    taps: Sequence[int],
    input_size: Sequence[int],
    *,
    strides: PerAxis = 1,
    padding: Padding = "VALID",
    input_dilation: PerAxis = 1,
    kernel_dilation: PerAxis = 1,
) -> list[Axis]:
    """Returns the window of each axis, its padding in numbers.

    ``"CIRCULAR"`` and ``"REFLECT"`` pad with values of the map: to the filter it is a
    larger map without padding. That a window larger than the map reads a value twice,
    and a reflecting one does at the border, is left out: each tap counts as a value of
    its own. ``"CAUSAL"`` pads with zeros, all before the first value.

    Args:
        taps: of the window along each axis.
        input_size: positions of the map along each axis.
        strides, padding, input_dilation, kernel_dilation: as in `flax.linen.Conv`.

    Raises:
        ValueError: sizes that are not numbers, or not one for each axis; an unknown
            padding; one in words, with zeros between the values.
    """
    rank = len(taps)
    if not all(isinstance(size, (int, np.integer)) for size in input_size):
        raise ValueError(
            f"input_size is {tuple(input_size)}; the share of positions at the border"
            " needs numbers. Where sizes are symbolic, the state is unknown: None."
        )
    sizes = per_axis("input_size", input_size, rank)
    strides = per_axis("strides", strides, rank)
    input_dilation = per_axis("input_dilation", input_dilation, rank)
    kernel_dilation = per_axis("kernel_dilation", kernel_dilation, rank)
    axes = [
        Axis(*numbers)
        for numbers in zip(
            taps, sizes, strides, [(0, 0)] * rank, input_dilation, kernel_dilation
        )
    ]
    if not isinstance(padding, str):
        pads = _pairs(padding, rank)
        return [axis._replace(padding=pad) for axis, pad in zip(axes, pads)]
    check_choice("padding", padding.upper(), PADDINGS)
    padding = padding.upper()
    if padding == "VALID":
        return axes
    if any(dilation != 1 for dilation in input_dilation):
        raise ValueError(
            f"padding is {padding!r} with input_dilation {input_dilation}; say it in"
            " numbers, one pair for each axis."
        )
    if padding in ("CIRCULAR", "REFLECT"):
        return [axis._replace(size=axis.size + axis.span - 1) for axis in axes]
    if padding == "CAUSAL":
        return [axis._replace(padding=(axis.span - 1, 0)) for axis in axes]
    pads = lax.padtype_to_pads(sizes, [axis.span for axis in axes], strides, padding)
    return [axis._replace(padding=pad) for axis, pad in zip(axes, pads)]


def transposed(
    taps: Sequence[int],
    input_size: Sequence[int],
    *,
    strides: PerAxis = 1,
    padding: Padding = "SAME",
    kernel_dilation: PerAxis = 1,
) -> tuple[list[int], dict[str, Sequence]]:
    """Returns a transposed convolution as one with zeros between the values.

    Args:
        taps, input_size, strides, padding, kernel_dilation: as in
            `flax.linen.ConvTranspose`.

    Returns:
        The size of the map, and the other arguments of `slide`.
    """
    axes = slide(
        taps,
        input_size,
        strides=strides,
        padding="VALID",
        kernel_dilation=kernel_dilation,
    )
    if isinstance(padding, str):
        zeros = [padding] * len(axes)
    else:
        zeros = _pairs(padding, len(axes))
    moved = [_transposed_axis(axis, pad) for axis, pad in zip(axes, zeros)]
    return [axis.size for axis in moved], {
        "padding": [axis.padding for axis in moved],
        "input_dilation": [axis.input_dilation for axis in moved],
        "kernel_dilation": [axis.kernel_dilation for axis in moved],
    }


def _transposed_axis(axis: Axis, padding: str | tuple[int, int]) -> Axis:
    span, stride, size = axis.span, axis.stride, axis.size
    if padding == "SAME":  # one output for each value and zero
        total = span + stride - 2
        before = span - 1 if stride > span - 1 else -(-total // 2)
        padding = before, total - before
    elif padding == "VALID":  # every output that any value reaches
        padding = span - 1, max(span, stride) - 1
    elif padding == "CIRCULAR":
        # A circle has `size` strides of outputs and no border: as many as lie inside of
        # a longer map.
        outputs = size * stride
        size += 1 - (2 - span) // stride
        padding = 0, outputs - ((size - 1) * stride + 2 - span)
    elif isinstance(padding, str):
        check_choice("padding", padding, ("SAME", "VALID", "CIRCULAR"))
    return axis._replace(size=size, stride=1, padding=padding, input_dilation=stride)


def positions(axes: Sequence[Axis]) -> Positions:
    """Returns the kinds of position of a window with all its taps, row by row.

    Raises:
        ValueError: the window does not fit the map.
    """
    kinds = zip(*map(_positions_of_axis, axes))
    return Positions(*(functools.reduce(np.kron, of_axes) for of_axes in kinds))


def _positions_of_axis(axis: Axis) -> Positions:
    """For a 3-tap SAME kernel: the first position, the last, and all between."""
    taps, size, stride, (before, after), input_dilation, kernel_dilation = axis
    dilated = (size - 1) * input_dilation + 1
    outputs = (dilated + before + after - axis.span) // stride + 1
    if size < 1 or outputs < 1:
        raise ValueError(
            f"a kernel of {taps} taps (dilation {kernel_dilation}) does not fit an"
            f" input of {size} positions with padding {(before, after)}: the output is"
            " empty."
        )
    first = np.arange(outputs) * stride - before
    # The taps inside follow from how many are before the map, how many are not behind
    # it, and, with zeros between its values, the phase.
    reach = [-first, dilated - first]
    reach = [np.clip(-(-r // kernel_dilation), 0, taps) for r in reach]
    kinds = np.stack([*reach, first % input_dilation], axis=1)
    kinds, counts = np.unique(kinds, axis=0, return_counts=True)
    start, stop, phase = kinds[..., None].swapaxes(0, 1)
    tap = np.arange(taps)
    inside = (start <= tap) & (tap < stop)
    inside &= (phase + tap * kernel_dilation) % input_dilation == 0
    return Positions(inside.astype(float), counts / outputs)


def per_axis(name: str, value: PerAxis, rank: int) -> tuple[int, ...]:
    """Returns `value` as `rank` integers: one for each axis, or one for all; None is 1.

    Raises:
        ValueError: another number of them.
    """
    value = 1 if value is None else value
    numbers = (value,) * rank if isinstance(value, (int, np.integer)) else tuple(value)
    if len(numbers) != rank:
        raise ValueError(
            f"{name} is {value}; expected {rank} numbers, one for each axis of the map."
        )
    return numbers


def _pairs(padding: int | Sequence, rank: int) -> list[tuple[int, int]]:
    """Zeros before and after, of each axis: of an integer, integers, or pairs."""
    if isinstance(padding, (int, np.integer)):
        padding = (padding,) * rank
    pairs: list[Any] = [
        (p, p) if isinstance(p, (int, np.integer)) else tuple(p) for p in padding
    ]
    if len(pairs) != rank or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"padding is {padding}; expected one of {list(PADDINGS)}, an integer, or"
            f" {rank} integers or pairs (before, after), one for each axis of the map."
        )
    return pairs
