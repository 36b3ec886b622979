"""Tables from the summaries of runs."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

COLUMNS = (
    "variant",
    "norm",
    "batch_size",
    "micro_batch_size",
    "learning_rate",
    "devices",
    "seed",
    "test_moving_accuracy",
    "test_batch_accuracy",
    "final_train_loss",
    "parameters",
    "steps",
    "seconds",
)
_TEXT = {"variant", "norm"}
_WHOLE = {"batch_size", "micro_batch_size", "devices", "seed", "parameters", "steps"}


class Run(NamedTuple):
    """A run's summary, and its metrics by step."""

    summary: dict[str, Any]
    metrics: list[dict[str, float]]

    @property
    def diverged(self) -> bool:
        """Whether training stopped at a NaN or infinity."""
        return self.summary.get("diverged", False)

    def row(self) -> dict[str, Any]:
        """Returns the summary's columns of the table; None where there is none."""
        return {column: self.summary.get(column) for column in COLUMNS}


def describe(summary: dict[str, Any]) -> str:
    """Returns what a single run came to, in two lines."""
    images = summary["steps"] * summary["batch_size"] / summary["seconds"]
    return (
        f"{summary['norm']}: batch {summary['batch_size']}, micro-batch"
        f" {summary['micro_batch_size']}, {summary['devices']} device(s),"
        f" {summary['steps']} steps in {summary['seconds']:.0f} s with tests and"
        f" checkpoints, {images:.0f} images/s\n"
        f"test accuracy on {summary['test_images']} images"
        f"  A, moving statistics: {_accuracy(summary, 'moving')}"
        f"  B, micro-batch statistics: {_accuracy(summary, 'batch')}"
    )


def _accuracy(summary: dict[str, Any], option: str) -> str:
    accuracy = f"{summary[f'test_{option}_accuracy']:.2%}"
    # Not there for few classes, and in runs from before it was counted.
    top5 = summary.get(f"test_{option}_top5_accuracy")
    return accuracy if top5 is None else f"{accuracy} (top-5 {top5:.2%})"


def groups(runs: list[Run]) -> dict[tuple[str, int], list[Run]]:
    """Groups runs that differ in the seed alone, by variant and micro-batch size."""
    result: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        key = run.summary["variant"], run.summary["micro_batch_size"]
        result.setdefault(key, []).append(run)
    return result


def spread(runs: list[Run], column: str) -> tuple[float, float]:
    """Mean and sample standard deviation over the runs that did not diverge."""
    return mean_sd([run.summary[column] for run in runs if not run.diverged])


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for none, and NaN deviation for one)."""
    mean = float(np.mean(values)) if values else float("nan")
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def table(runs: list[Run]) -> str:
    """Returns a Markdown table: a row for each variant and micro-batch size."""
    header = (
        "variant",
        "batch",
        "micro-batch",
        "devices",
        "seeds",
        "A, moving (%)",
        "B, micro-batch (%)",
        "train loss",
        "s / run",
    )
    rows = [header]
    for (variant, micro), members in groups(runs).items():
        alive = [run for run in members if not run.diverged]
        lost = len(members) - len(alive)
        first = (alive or members)[0].summary
        rows.append(
            (
                variant,
                str(first.get("batch_size", "")),
                str(micro),
                str(first.get("devices", "")),
                str(len(members)) + (f", {lost} diverged" if lost else ""),
                plus_minus(
                    spread(members, "test_moving_accuracy"), lambda v: f"{v:.2%}"
                ),
                plus_minus(
                    spread(members, "test_batch_accuracy"), lambda v: f"{v:.2%}"
                ),
                plus_minus(spread(members, "final_train_loss"), lambda v: f"{v:.3f}"),
                plus_minus(
                    (spread(members, "seconds")[0], np.nan), lambda v: f"{v:.0f}"
                ),
            )
        )
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table, of which the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def plus_minus(mean_sd: tuple[float, float], show: Callable[[float], str]) -> str:
    """Returns mean ± deviation, or as much of it as there is; no percent signs."""
    mean, sd = (None if np.isnan(v) else show(v).removesuffix("%") for v in mean_sd)
    if mean is None:
        return "-"
    return mean if sd is None else f"{mean} ± {sd}"


def write_csv(path: pathlib.Path, runs: list[Run]) -> None:
    """Writes one line for each run."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(run.row() for run in runs)


def read_csv(path: pathlib.Path) -> list[Run]:
    """Reads what `write_csv` wrote; the metrics by step are not in it.

    Raises:
        ValueError: the file has other columns.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path} has the columns {reader.fieldnames}; expected a comparison.csv"
                f" of train.compare, with {list(COLUMNS)}."
            )
        return [_read_row(row) for row in reader]


def _read_row(row: dict[str, str]) -> Run:
    summary: dict[str, Any] = {
        column: text if column in _TEXT else float(text)
        for column, text in row.items()
        if text
    }
    for column in _WHOLE & summary.keys():
        summary[column] = int(summary[column])
    # A run that diverged has no accuracy.
    diverged = "test_moving_accuracy" not in summary
    return Run(summary | ({"diverged": True} if diverged else {}), [])
