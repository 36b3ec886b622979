"""A table of the paper beside ours: printed, as CSV and as JSON."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from train.engine import workdir as wd
from train.studies import report

#: at the end of a row's name: the same, by what we found best in place of the paper's
OURS = ", ours"

#: how a unit is printed
FORMATS = {
    "accuracy (%)": "{:.2f}",
    "AP (%)": "{:.1f}",
    "steps": "{:,.0f}",
    "examples/s": "{:.2f}",
    "ratio": "{:.3f}",
}


class Result(NamedTuple):
    """A cell of a table.

    Attributes:
        row, column: as the paper calls them; ours where it has no such row.
        paper: what it prints there, or nothing.
        unit: a key of `FORMATS`.
        values: ours, one for each seed or timing; NaN where there is none, which
            `missing` explains. Empty: not run.
        missing: why a value is NaN.
        reduced: what our run was cut down by; empty if by nothing.
        facts: more columns of the CSV.
    """

    row: str
    column: str
    paper: str
    unit: str
    values: Sequence[float] = ()
    missing: str = "diverged"
    reduced: str = ""
    facts: dict[str, Any] = {}  # noqa: RUF012

    @property
    def spread(self) -> tuple[float, float]:
        """Mean and standard deviation of ours, NaN where there is none."""
        return report.mean_sd([v for v in self.values if not math.isnan(v)])

    @property
    def printed(self) -> float:
        """The paper's number; NaN where there is none."""
        number = self.paper.removesuffix("k") or "nan"
        return float(number) * (1000 if self.paper.endswith("k") else 1)

    @property
    def difference(self) -> float:
        """Ours less the paper's; NaN where one of them is missing."""
        return self.spread[0] - self.printed

    def cells(self) -> list[str]:
        """Paper, ours, number of runs and difference, as text."""
        form = FORMATS[self.unit]
        found = sum(not math.isnan(v) for v in self.values)
        ours = report.plus_minus(self.spread, form)
        if not found:
            ours = self.missing if self.values else "not run"
        count = str(len(self.values))
        if found < len(self.values):
            count = f"{found} of {count}"
        signed = form.replace("{:", "{:+")
        gap = report.plus_minus((self.difference, math.nan), signed)
        return [self.paper or "-", ours, count, gap]

    def line(self) -> dict[str, Any]:
        """Everything, as numbers: a line of the CSV."""
        mean, sd = (None if np.isnan(v) else v for v in self.spread)
        gap = None if np.isnan(self.difference) else self.difference
        return {
            "row": self.row,
            "column": self.column,
            "unit": self.unit,
            "paper": self.paper,
            "mean": mean,
            "sd": sd,
            "runs": len(self.values),
            "without_value": sum(map(math.isnan, self.values)),
            "difference": gap,
            "reduced": self.reduced,
            **self.facts,
        }


def table(results: list[Result], runs: str = "seeds") -> str:
    """Returns a Markdown table, and below it what was reduced, by number.

    Args:
        results: the cells, a line for each.
        runs: what `values` are one for each of.
    """
    reductions = list(dict.fromkeys(r.reduced for r in results if r.reduced))
    lines: list[tuple[str, ...]] = [
        ("", "", "paper", "ours", runs, "difference", "reduced")
    ]
    for result in results:
        reduced = result.reduced
        number = f"[{reductions.index(reduced) + 1}]" if reduced else "-"
        lines.append((result.row, result.column, *result.cells(), number))
    notes = [f"[{i}] reduced: {text}" for i, text in enumerate(reductions, start=1)]
    return "\n".join([report.markdown(lines), *notes])


def write(workdir: pathlib.Path, name: str, results: list[Result], **more: Any) -> None:
    """Writes NAME.csv, and NAME.json with every value, command, hardware, versions."""
    workdir.mkdir(parents=True, exist_ok=True)
    lines = [result.line() for result in results]
    pd.DataFrame(lines, dtype=object).to_csv(workdir / f"{name}.csv", index=False)
    values = [[None if math.isnan(v) else v for v in r.values] for r in results]
    rows = [line | {"values": each} for line, each in zip(lines, values)]
    wd.write_json(workdir / f"{name}.json", wd.provenance() | more | {"results": rows})
