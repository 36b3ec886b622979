"""The figure of a table of the paper, beside ours, or of curves."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot as plt

from train.paper.result import Result
from train.studies.figure import curve as draw_curve


class Curve(NamedTuple):
    """What to draw over the course of training: a column of ``metrics.jsonl``."""

    column: str
    title: str
    by_epoch: bool = False


def plot(
    path: pathlib.Path,
    results: list[Result],
    series: dict[str, Any],
    curve: Curve | None,
) -> None:
    """Draws the paper's numbers (crosses) beside ours (dots, one standard deviation to
    each side), a panel for each unit; before them `curve` of `series`, by label."""
    units = list(dict.fromkeys(each.unit for each in results))
    panels = len(units) + bool(curve)
    size = (6 * panels + 2, max(4.5, 0.28 * len(results)))
    figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False)
    if curve:
        _curves(axes[0, 0], series, curve)
    for axis, unit in zip(axes[0, bool(curve) :], units):
        _beside(axis, [each for each in results if each.unit == unit])
        axis.set_xlabel(unit)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    if any(each.reduced for each in results):
        figure.suptitle(f"ours was reduced: see {path.stem}.csv", fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _curves(axis: Any, series: dict[str, Any], curve: Curve) -> None:
    for label, each in series.items():
        alive = [run for run in each.runs if not run.diverged]
        if alive:
            first = alive[0].summary
            per_epoch = first["train_images"] // first["batch_size"]
            per_x = per_epoch if curve.by_epoch else 1
            draw_curve(axis, alive, curve.column, 100, per_x, label=label, marker=".")
    if series:
        axis.legend(fontsize="small")
    axis.set(title=curve.title, ylabel="accuracy (%)")
    axis.set(xlabel="epoch" if curve.by_epoch else "step")


def _beside(axis: Any, results: list[Result]) -> None:
    at = np.arange(len(results))
    means, deviations = np.array([each.spread for each in results]).T
    axis.errorbar(means, at, xerr=np.nan_to_num(deviations), fmt="o", label="ours")
    axis.plot([each.printed for each in results], at, "kx", label="paper")
    names = [f"{each.row}, {each.column}" for each in results]
    axis.set_yticks(at, names, fontsize="small")
    axis.set_ylim(len(results) - 0.5, -0.5)
    axis.legend(fontsize="small")
