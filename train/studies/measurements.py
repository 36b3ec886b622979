"""Tables of single rows of the files of ``docs/results``.

They are declared beside those of many runs, with ``of = "timings"`` for
``timings.csv``. A row names one row of the file, a column may change the filter, and
says what to `show`:

- ``number``: the entry of column `column`, divided by that of `over` and times `times`
  where there are such keys, with its `unit`;
- ``ratio``: the same over that of `flax`, Flax's batch norm under the same filter;
- ``quartiles``: a ratio that was measured pair by pair, with what half of the pairs lie
  between;
- ``both``: the entries of `flax` and of the row;
- ``text``: `text`, with the row's entries where it has ``{COLUMN}``.

What was measured more than once has several studies in its row: ``studies = {quiet =
..., busy = ...}``. The column says which it takes, ``study = ["busy", "quiet"]``: the
first of these that the row has. Where it has none, the cell is a dash.

Numbers have `digits` after the point, or as many as make `significant` digits in all,
at least.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pandas as pd

from kalman_flax._filter.state import check_choice
from train.studies.report import markdown, show

FILES = ("timings", "statistics", "evaluations", "runs")
BASELINE = {"variant": "flax"}


def read(folder: pathlib.Path, name: str) -> pd.DataFrame:
    """Returns all measurements of one of `FILES`."""
    check_choice("of", name, FILES)
    return pd.read_csv(folder / f"{name}.csv", low_memory=False)


def render(table: dict[str, Any], measured: pd.DataFrame) -> str:
    """Returns a declared table as Markdown.

    Raises:
        ValueError: a filter fits no row, or several.
    """
    lines = [[*table["head"], *(column["head"] for column in table["columns"])]]
    for *names, which in table["rows"]:
        which = table.get("where", {}) | which
        cells = [_cell(measured, which, table | c) for c in table["columns"]]
        lines.append([*names, *cells])
    return markdown(lines)


def _cell(measured: pd.DataFrame, which: dict[str, Any], column: dict[str, Any]) -> str:
    which = which | column.get("which", {})
    studies = which.pop("studies", {})
    if "study" in column:
        there = [studies[name] for name in column["study"] if name in studies]
        if not there:
            return "-"
        which["study"] = there[0]
    name, shown = column.get("column", ""), column.get("show")

    def text(value: float) -> str:
        return show(value, f"{{:,.{_digits(value, column)}f}}")

    def number(row: pd.Series) -> float:
        over = row[column["over"]] if "over" in column else 1
        return row[name] / over * column.get("times", 1)

    row = _only(measured, which)
    if shown == "text":
        return re.sub(r"{(\w+)}", lambda m: text(row[m[1]]), column["text"])
    if shown == "number":
        return text(number(row)) + column.get("unit", "")
    if shown == "quartiles":
        middle, low, high = (text(row[name + end]) for end in ("", "_low", "_high"))
        return f"{middle} ({low} to {high})"
    flax = _only(measured, which | BASELINE)
    if shown == "both":
        return f"{text(number(flax))}, {text(number(row))}"
    if shown == "ratio":
        return text(number(row) / number(flax))
    raise ValueError(
        f"a column shows {shown!r}, which is none of those that there are."
    )


def _digits(value: float, column: dict[str, Any]) -> int:
    """Of a number, those after the point."""
    if "significant" not in column:
        return column.get("digits", 2)
    return max(0, column["significant"] - len(str(int(abs(value)))))


def _only(measured: pd.DataFrame, which: dict[str, Any]) -> pd.Series:
    for column, value in which.items():
        measured = measured[measured[column] == value]
    if len(measured) != 1:
        raise ValueError(f"{len(measured)} rows fit {which}; expected one.")
    return measured.iloc[0]
