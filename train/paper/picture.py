"""The figure of a table of the paper, beside ours, or of curves."""

from __future__ import annotations

import pathlib
import textwrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from train.paper.result import OURS, Result
from train.studies.figure import GREY, STYLE, names_at_ends, palette
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
    """Draws ours (dots, one standard deviation to each side) beside the paper's numbers
    (crosses), a panel for each unit and one for differences of rows; before them
    `curve` of `series`, by label. What was reduced stands below."""
    run = [each for each in results if each.values] or results
    panels: dict[tuple[bool, str], list[Result]] = {}
    for each in run:
        panels.setdefault((" - " in each.row, each.unit), []).append(each)
    reductions = list(dict.fromkeys(each.reduced for each in run if each.reduced))
    if not any(_alive(each) for each in series.values()):
        curve = None
    drawn = curve is not None
    count = drawn + len(panels)
    rows = max(map(len, panels.values()), default=1)
    size = 6.5 * count, max(3.6, 0.3 * rows + 1.4) + 0.35 * len(reductions)
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(1, count, figsize=size, squeeze=False)
        if curve is not None:
            _curves(axes[0, 0], series, curve)
        for axis, ((difference, unit), group) in zip(axes[0, drawn:], panels.items()):
            _beside(axis, group, reductions)
            if difference:
                axis.set_title("Differences")
            axis.set_xlabel("points" if difference and "%" in unit else unit)
        notes = [
            textwrap.fill(
                f"{_number(text, reductions)} Ours was reduced: {text}".strip(),
                int(15 * size[0]),
            )
            for text in reductions
        ]
        figure.supxlabel("\n".join(notes), x=0.01, ha="left", fontsize="small")
        figure.savefig(path)
        plt.close(figure)


def _alive(series: Any) -> list[Any]:
    return [run for run in series.runs if not run.diverged]


def _color(row: str) -> str:
    ours, paper = palette()[:2]
    return ours if row.endswith(OURS) else paper


def _curves(axis: Any, series: dict[str, Any], curve: Curve) -> None:
    ends = []
    ranked = sorted(series, key=lambda label: not label.endswith(OURS))
    for label, color in zip(ranked, [*palette()] + [GREY] * len(ranked)):
        if alive := _alive(series[label]):
            first = alive[0].summary
            per_epoch = first["train_images"] // first["batch_size"]
            per_x = per_epoch if curve.by_epoch else 1
            style = {"color": color, "marker": "."}
            (line,) = draw_curve(axis, alive, curve.column, 100, per_x, **style)
            if len(heights := line.get_ydata()):
                ends.append((heights[-1], label, color))
    names_at_ends(axis, ends)
    axis.set(title=curve.title[:1].upper() + curve.title[1:], ylabel="accuracy (%)")
    axis.set_xlabel("epoch" if curve.by_epoch else "update")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _beside(axis: Any, results: list[Result], reductions: list[str]) -> None:
    """Draws a row for each result; ours by what we found best has no cross, since the
    paper has no such row."""
    for at, each in enumerate(results):
        mean, deviation = each.spread
        color = _color(each.row)
        axis.errorbar(mean, at, xerr=np.nan_to_num(deviation), fmt="o", color=color)
        if not each.row.endswith(OURS):
            axis.plot(each.printed, at, "kx")
    ours = [each.row.endswith(OURS) for each in results]
    printed = any(each.paper for each, default in zip(results, ours) if not default)
    if any(each.values for each in results):
        axis.plot([], [], "o", color=palette()[1], label="ours")
    if any(ours):
        axis.plot([], [], "o", color=palette()[0], label="ours, by our default")
    if printed:
        axis.plot([], [], "kx", label="paper")
    axis.legend()
    axis.set_title("Ours and the paper's" if printed else "Ours")
    one_column = len({each.column for each in results}) == 1
    labels = [
        each.row
        + ("" if one_column else f", {each.column}")
        + _number(each.reduced, reductions)
        for each in results
    ]
    axis.set_yticks(range(len(results)), labels)
    axis.set_ylim(len(results) - 0.5, -0.5)


def _number(reduced: str, reductions: list[str]) -> str:
    """Returns the number of what was reduced, where there are several."""
    if not reduced or len(reductions) == 1:
        return ""
    return f" [{reductions.index(reduced) + 1}]"
