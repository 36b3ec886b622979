"""Pictures of the documents, made of the ledger and declared beside the tables."""

from __future__ import annotations

import pathlib
from typing import Any

import pandas as pd

from train.studies import figure
from train.studies.figure import Line, is_ours
from train.studies.tables import OPTION_A, select


def draw(
    declared: dict[str, dict[str, Any]], runs: pd.DataFrame, folder: pathlib.Path
) -> list[pathlib.Path]:
    """Draws the accuracy by micro-batch size of each declared picture.

    A picture has a `title`, a filter `where`, and `lines`: name, filter and, for
    normalisers that the micro-batch does not matter to, true. `colored` names the lines
    that have a colour, ours first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in declared.items():
        paths.append(folder / f"{name}.png")
        figure.save_by_size(
            paths[-1],
            [_line(runs, picture.get("where", {}), *each) for each in picture["lines"]],
            picture["colored"],
            picture["title"],
        )
    return paths


def _line(
    runs: pd.DataFrame,
    common: dict[str, Any],
    name: str,
    which: dict[str, Any],
    flat: bool = False,
) -> Line:
    sizes = select_sizes(runs, common | which)
    if not sizes:
        raise ValueError(f"no run fits the line {name!r} with {common | which}.")
    return Line(name, is_ours(which.get("norm", "")), sizes, flat)


def select_sizes(runs: pd.DataFrame, which: dict[str, Any]) -> dict[int, list[float]]:
    """Returns the accuracies of the seeds, in %, by micro-batch size."""
    values = {}
    for size in sorted(runs.micro_batch_size.unique()):
        found = select(runs, {"micro_batch_size": size} | which)
        if len(found) and which.get("micro_batch_size", size) == size:
            values[int(size)] = (100 * found[OPTION_A]).to_list()
    return values
