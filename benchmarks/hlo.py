"""What a compiled program does, read from its HLO."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-reduce|all-gather|all-to-all|reduce-scatter"
    r"|collective-permute|collective-broadcast|ragged-all-to-all)(?:-start)?\("
)
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_SIZES = {"pred": 1, "bf16": 2}

_NAME = re.compile(r"%[\w.\-]+")
_INSTRUCTION = re.compile(
    r"^ +(?:ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)", re.M
)
_NO_KERNEL = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")


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


def bytes_moved(compiled: Any) -> float:
    """Returns the bytes that a compiled program reads and writes, by XLA's own count.

    That counts as read and written what passes an optimisation barrier, where nothing
    moves: taken off here.
    """
    barriers = re.findall(r"= (\(.*\)|\S+) opt-barrier\(", compiled.as_text())
    passed = sum(
        _bytes(*shape) for shapes in barriers for shape in _SHAPE.findall(shapes)
    )
    return compiled.cost_analysis()["bytes accessed"] - 2 * passed


def bytes_of_kernels(hlo: str) -> int:
    """Returns the bytes of all that enters and leaves the kernels of a program: what it
    would move if each read its operands once, and nothing stayed in a cache."""
    hlo = re.sub(r"(?<=\])\{[^{}]*\}", "", hlo)  # layouts
    entry = hlo[hlo.index("\nENTRY ") :]
    sizes: dict[str, int] = {}
    total = 0
    for name, shapes, kind, operands in _INSTRUCTION.findall(entry):
        sizes[name] = sum(_bytes(*shape) for shape in _SHAPE.findall(shapes))
        if kind not in _NO_KERNEL:
            read = sum(sizes.get(other, 0) for other in _NAME.findall(operands))
            total += sizes[name] + read
    return total


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


def operations(hlo: str) -> str:
    """Returns a compiled program without what may differ between two that do the same:
    names, and where in the sources an operation comes from."""
    hlo = re.sub(r", metadata=\{.*?\}", "", hlo)
    computations = re.split(r"^(?=%|ENTRY)", hlo, flags=re.M)[1:]
    text = re.sub(
        r"\n(FileNames|StackFrames)\n.*", "", "".join(computations), flags=re.S
    )
    numbers: dict[str, str] = {}
    return re.sub(
        _NAME, lambda name: numbers.setdefault(name[0], f"%{len(numbers)}"), text
    )
