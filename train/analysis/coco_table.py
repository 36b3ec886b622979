"""COCO's twelve numbers as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from train.engine.average_precision import NUMBERS

Numbers = Mapping[str, Mapping[str, float]]


def by_option(found: Mapping[str, float], option: str) -> Numbers:
    """Returns the numbers of one option, by ``"box"`` or ``"mask"`` and name, of what
    `train.engine.detection.Detection.evaluate` returned."""
    return {
        kind: {
            name: found[key]
            for name in NUMBERS
            if (key := f"{option}_{kind}_{name}") in found
        }
        for kind in ("box", "mask")
    }


def coco_table(columns: Mapping[str, Numbers]) -> str:
    """Returns a line for each number; a dash where nothing says it.

    Args:
        columns: by a short name, of which there is one column for boxes and one for
            masks.
    """
    heads = [f"{kind}, {name}" for name in columns for kind in ("box", "mask")]
    lines = [f"{'':<10}" + "".join(f"{head:>9}" for head in heads)]
    for name in NUMBERS:
        values = [
            format(column[kind][name], ".4f") if name in column[kind] else "-"
            for column in columns.values()
            for kind in ("box", "mask")
        ]
        lines.append(f"{name:<10}" + "".join(f"{value:>9}" for value in values))
    return "\n".join(lines)
