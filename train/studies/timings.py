"""Tables of speed, memory and communication, made of ``docs/results/timings.csv``.

They are declared beside those of runs, with ``of = "timings"``. A row names one row of
the file, a column may change the filter, and says what to `show`:

- ``number``: the entry of column `column`, divided by that of `over` and times `times`
  where there are such keys, with its `unit`;
- ``ratio``: the same over that of `flax`, Flax's batch norm under the same filter;
- ``quartiles``: a ratio that was measured pair by pair, with what half of the pairs lie
  between;
- ``both``: the entries of `flax` and of the row.
"""

from __future__ import annotations

import pathlib
from typing import Any

import pandas as pd

from train.studies.report import markdown, show

TIMINGS = "timings.csv"
BASELINE = {"variant": "flax"}


def read(folder: pathlib.Path) -> pd.DataFrame:
    """Returns all measurements."""
    return pd.read_csv(folder / TIMINGS)


def render(table: dict[str, Any], timings: pd.DataFrame) -> str:
    """Returns a declared table as Markdown.

    Raises:
        ValueError: a filter fits no row, or several.
    """
    lines = [[*table["head"], *(column["head"] for column in table["columns"])]]
    for *names, which in table["rows"]:
        which = table.get("where", {}) | which
        cells = [_cell(timings, which, table | c) for c in table["columns"]]
        lines.append([*names, *cells])
    return markdown(lines)


def _cell(timings: pd.DataFrame, which: dict[str, Any], column: dict[str, Any]) -> str:
    which = which | column.get("which", {})
    name, shown = column["column"], column["show"]
    form = f"{{:,.{column.get('digits', 2)}f}}"

    def number(row: pd.Series) -> float:
        over = row[column["over"]] if "over" in column else 1
        return row[name] / over * column.get("times", 1)

    row = _only(timings, which)
    if shown == "number":
        return show(number(row), form) + column.get("unit", "")
    if shown == "quartiles":
        middle, low, high = (
            show(row[name + end], form) for end in ("", "_low", "_high")
        )
        return f"{middle} ({low} to {high})"
    flax = _only(timings, which | BASELINE)
    if shown == "both":
        return f"{show(number(flax), form)}, {show(number(row), form)}"
    if shown == "ratio":
        return show(number(row) / number(flax), form)
    raise ValueError(
        f"a column shows {shown!r}, which is none of those that there are."
    )


def _only(timings: pd.DataFrame, which: dict[str, Any]) -> pd.Series:
    for column, value in which.items():
        timings = timings[timings[column] == value]
    if len(timings) != 1:
        raise ValueError(f"{len(timings)} rows of {TIMINGS} fit {which}; expected one.")
    return timings.iloc[0]
