"""What a compiled program does, read from its HLO."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-reduce|all-gather|all-to-all|reduce-scatter"
    r"|collective-permute|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_SIZES = {"pred": 1, "bf16": 2}


class Collective(NamedTuple):
    """An operation between devices, and the bytes of its result on one of them."""

    kind: str
    size: int


def collectives(hlo: str) -> list[Collective]:
    """Returns the operations between devices in the text of a compiled program."""
    return [
        Collective(kind, sum(_bytes(*shape) for shape in _SHAPE.findall(shapes)))
        for shapes, kind in _COLLECTIVE.findall(hlo)
    ]


def _bytes(dtype: str, dimensions: str) -> int:
    size = _SIZES.get(dtype) or int(dtype[1:]) // 8
    return size * int(np.prod([int(n) for n in dimensions.split(",") if n]))


def count_fusions(hlo: str) -> int:
    """Returns the number of fusions and other kernels in a compiled program, without
    what is inside of a fusion."""
    fused = set(re.findall(r" fusion\(.*calls=(%[\w.\-]+)", hlo))
    computations = re.split(r"\n(?=\S)", hlo)
    return sum(
        len(re.findall(r"\S+ = .* (?:fusion|custom-call|convolution|dot)\(", text))
        for text in computations
        if text.split(" ", 1)[0] not in fused
    )
