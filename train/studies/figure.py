"""The figure of a comparison."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib
import numpy as np

from train.studies.report import Run, groups, spread

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OPTIONS = (("moving", "o", "-"), ("batch", "s", "--"))  # A and B: marker, line


def plot(path: pathlib.Path, runs: list[Run]) -> None:
    """Draws training loss and test accuracy by step, and the accuracy at the end: by
    micro-batch size where there are several, else by variant.

    Lines are means over seeds, bands and bars one standard deviation; the test accuracy
    is option A (solid, circles) and option B (dashed, squares).
    """
    members = {
        key: alive
        for key, group in groups(runs).items()
        if (alive := [run for run in group if not run.diverged])
    }
    height = max(4.5, 0.28 * len(members))
    figure, (loss, accuracy, end) = plt.subplots(1, 3, figsize=(16, height))
    for (variant, micro), group in members.items():
        (line,) = curve(loss, group, "train_loss", label=f"{variant}, {micro}")
        style = {"color": line.get_color(), "marker": "o", "markersize": 3}
        for option, _, dashes in OPTIONS:
            curve(accuracy, group, f"test_{option}_accuracy", 100, ls=dashes, **style)
    sizes = {micro for _, micro in members}
    if len(sizes) > 1:
        _by_size(end, members)
        end.legend(fontsize="small")
    else:
        _by_variant(end, members)
    loss.set(xlabel="step", ylabel="training loss")
    accuracy.set(
        xlabel="step",
        ylabel="test accuracy (%)",
        title="option A (moving statistics) solid, B (micro-batch) dashed",
    )
    end.set(title="at the end: A circles, B squares")
    for axes in (loss, accuracy, end):
        axes.grid(alpha=0.3)
    if members:
        loss.legend(fontsize="x-small", title="variant, micro-batch size")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _by_size(axes: Any, members: dict[tuple[str, int], list[Run]]) -> None:
    by_variant: dict[str, dict[int, list[Run]]] = {}
    for (variant, micro), group in members.items():
        by_variant.setdefault(variant, {})[micro] = group
    for variant, points in by_variant.items():
        color, label = None, variant
        for option, marker, dashes in OPTIONS:
            stats = [
                spread(points[micro], f"test_{option}_accuracy")
                for micro in sorted(points)
            ]
            means, sds = 100 * np.array(stats).T
            bars = axes.errorbar(
                sorted(points),
                means,
                np.nan_to_num(sds),
                fmt=marker + dashes,
                label=label,
                color=color,
                capsize=3,
            )
            color, label = bars.lines[0].get_color(), None
    sizes = sorted({micro for _, micro in members})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(micro) for micro in sizes])
    axes.set_xlabel("micro-batch size")


def _by_variant(axes: Any, members: dict[tuple[str, int], list[Run]]) -> None:
    for row, group in enumerate(members.values()):
        for option, marker, _ in OPTIONS:
            mean, sd = spread(group, f"test_{option}_accuracy")
            axes.errorbar(
                100 * mean,
                row,
                xerr=100 * np.nan_to_num(sd),
                fmt=marker,
                color=f"C{row % 10}",
                capsize=3,
                fillstyle="full" if option == "moving" else "none",
            )
    axes.set_yticks(range(len(members)), [variant for variant, _ in members])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy (%)")


def curve(
    axes: Any,
    runs: list[Run],
    column: str,
    factor: float = 1.0,
    steps_per_x: float = 1.0,
    **style: Any,
) -> list[Any]:
    """Draws the mean over runs of a column, times `factor`, by step, of which so many
    are 1 on the axis, with a band of one deviation."""
    points: dict[int, list[float]] = {}
    for run in runs:
        for line in run.metrics:
            if column in line:
                points.setdefault(int(line["step"]), []).append(factor * line[column])
    steps = sorted(points)
    x = np.array(steps) / steps_per_x
    mean = np.array([np.mean(points[step]) for step in steps])
    sd = np.array([np.std(points[step]) for step in steps])
    lines = axes.plot(x, mean, **style)
    axes.fill_between(x, mean - sd, mean + sd, alpha=0.15, color=lines[0].get_color())
    return lines
