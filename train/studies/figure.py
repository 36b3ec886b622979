"""The pictures of a comparison, each of one thing.

A line or a dot is a mean over seeds, a bar or a band one sample standard deviation.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from scipy.optimize import isotonic_regression

from train.data.text import pictured
from train.studies.report import (
    Run,
    groups,
    headline_of,
    mean_sd,
    metric_name,
    options,
    spread,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLE = "train.style"
GREY = "#AAAAAA"
RIVALS = 3  # that have a colour and a name, beside ours
MOST_CURVES = 8


class Line(NamedTuple):
    """Results of one normaliser by micro-batch size.

    Attributes:
        name: what it is called in the picture.
        ours: whether it is Kalman Normalization.
        values: by micro-batch size those of the seeds, in %.
        flat: drawn through the whole picture: the micro-batch does not matter to it.
    """

    name: str
    ours: bool
    values: Mapping[int, Sequence[float]]
    flat: bool = False

    def points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns sizes, means and deviations (0 for one seed)."""
        sizes = sorted(self.values)
        means, deviations = zip(*(mean_sd(self.values[size]) for size in sizes))
        return np.array(sizes), np.array(means), np.nan_to_num(deviations)

    @property
    def rank(self) -> float:
        """The mean at the smallest size."""
        return self.points()[1][0]


def plot(path: pathlib.Path, runs: Sequence[Run]) -> None:
    """Draws the headline metric of the runs that did not diverge: by micro-batch size
    where there are several, else at the end of training; beside it, of up to eight, in
    the course of training."""
    sizes = {run.summary["micro_batch_size"] for run in runs}
    members = {
        _name(variant, micro, len(sizes) > 1): alive
        for (variant, micro), group in groups(runs).items()
        if (alive := [run for run in group if not run.diverged])
    }
    lines = _lines(members)
    by_size = any(len(line.values) > 1 for line in lines)
    curves = 0 < len(members) <= MOST_CURVES and all(
        len(group[0].metrics) > 1 for group in members.values()
    )
    headline = headline_of(runs)
    height = 4.5 if by_size else max(3.2, 0.27 * len(members) + 1.2)
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(
            1, 1 + curves, figsize=(7 + 5 * curves, height), squeeze=False
        )
        first, *rest = axes[0]
        if by_size:
            draw_by_size(first, lines, _colors_of(lines))
            name = metric_name(headline)
            first.set(title=_title(f"{name} by micro-batch size"), ylabel=f"{name} (%)")
        else:
            draw_dots(first, members, headline)
        for axis in rest:
            draw_curves(axis, members, headline)
        figure.savefig(path)
        plt.close(figure)


def _title(text: str) -> str:
    return text[:1].upper() + text[1:]


def save_by_size(
    path: pathlib.Path, lines: Sequence[Line], colored: Sequence[str], title: str
) -> None:
    """Draws accuracies by micro-batch size; `colored` are named, ours first."""
    with plt.style.context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 5.2))
        draw_by_size(axis, lines, dict(zip(colored, palette())))
        axis.set(title=title, ylabel="test accuracy (%)")
        figure.savefig(path)
        plt.close(figure)


def _name(variant: str, micro: int, with_size: bool) -> str:
    size = f"@{micro}"
    return pictured(variant + size if with_size and size not in variant else variant)


def is_ours(norm: str) -> bool:
    """Whether a normaliser is Kalman Normalization, of ours or the paper's."""
    return "kalman" in norm or norm.startswith("control_")


def _lines(members: dict[str, list[Run]]) -> list[Line]:
    values: dict[tuple[str, bool], dict[int, list[float]]] = {}
    for group in members.values():
        first = group[0].summary
        by_size = values.setdefault((first["variant"], is_ours(first["norm"])), {})
        by_size[first["micro_batch_size"]] = [
            100 * run.summary[run.headline] for run in group
        ]
    return [Line(pictured(name), ours, sizes) for (name, ours), sizes in values.items()]


def _colors_of(lines: Sequence[Line]) -> dict[str, str]:
    """Returns the colours of our best line, of batch norm and of the best rivals, by
    the smallest micro-batch; the names that are not there are grey."""
    at_several = [line for line in lines if len(line.values) > 1]
    ranked = sorted(at_several or lines, key=lambda line: -line.rank)
    ours = [line.name for line in ranked if line.ours][:1]
    rivals = [line.name for line in ranked if not line.ours]
    rivals.sort(key=lambda name: name != "batch")  # which all want to see
    first, *others = palette()
    # The first colour is ours, also where there is none of ours.
    return dict(zip(ours, [first])) | dict(zip(rivals[:RIVALS], others))


def palette() -> list[str]:
    """Returns the colours of the style that is in use, ours first."""
    return plt.rcParams["axes.prop_cycle"].by_key()["color"]


def draw_by_size(axis: Any, lines: Sequence[Line], colors: dict[str, str]) -> None:
    """Draws lines over a logarithmic axis of micro-batch sizes; those in `colors` have
    their names at their ends, the others are grey."""
    sizes = sorted({size for line in lines for size in line.values})
    ends = []
    for line in sorted(lines, key=lambda line: line.name in colors):
        x, mean, deviation = line.points()
        if line.flat:
            x = np.array([sizes[0], sizes[-1]])
            mean, deviation = np.repeat(mean[:1], 2), np.repeat(deviation[:1], 2)
        style = "--" if line.flat else "o-"
        if line.name not in colors:
            axis.plot(x, mean, style, color=GREY, lw=1, markersize=3)
            continue
        color, width = colors[line.name], 2.8 if line.ours else 1.8
        axis.errorbar(
            x, mean, deviation, fmt=style, color=color, lw=width, elinewidth=1, zorder=3
        )
        ends.append((mean[-1], line.name, color))
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_xlabel("micro-batch size (examples that share statistics)")
    names_at_ends(axis, ends)
    if grey := len(lines) - len(ends):
        axis.plot([], [], color=GREY, lw=1, label=f"{grey} others")
    if any(line.flat for line in lines):
        axis.plot([], [], "k--", lw=1, label="statistics of each image alone, or none")
    axis.legend(*axis.get_legend_handles_labels(), loc="lower right")


def names_at_ends(
    axis: Any, ends: Iterable[tuple[float, str, str]], gap: float = 0.05
) -> None:
    """Writes names (y, name, colour) right of the axes, as near to their heights as a
    distance of `gap` of the axis allows."""
    ends = sorted(ends)
    if not ends:
        return
    axis.set_ylim(axis.get_ylim())  # later lines move nothing
    to_axes = axis.transData + axis.transAxes.inverted()
    at = np.array([to_axes.transform((axis.get_xlim()[1], y))[1] for y, _, _ in ends])
    steps = gap * np.arange(len(ends))
    free = np.clip(at - steps, 0, max(0, 1 - steps[-1]))
    for height, (_, name, color) in zip(isotonic_regression(free).x + steps, ends):
        axis.annotate(
            name,
            (1, height),
            xycoords="axes fraction",
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize="small",
            fontweight="bold",
        )


def draw_dots(axis: Any, members: dict[str, list[Run]], headline: str) -> None:
    """Draws what each came to at the end as a dot, the best first, option B open where
    it is another; of two the gap between them is written."""
    ranked = sorted(members, key=lambda name: -spread(members[name], headline)[0])
    option_a, *others = options(headline)
    ours, rival = palette()[:2]
    for row, name in enumerate(ranked):
        group = members[name]
        color = ours if is_ours(group[0].summary["norm"]) else rival
        mean, deviation = spread(group, option_a)
        for other in others:
            value = 100 * spread(group, other)[0]
            if abs(value - 100 * mean) > 0.5:
                axis.plot(value, row, "o", color=color, fillstyle="none")
        bar = 100 * np.nan_to_num(deviation)
        axis.errorbar(100 * mean, row, xerr=bar, fmt="o", color=color, markersize=6)
        if len(ranked) == 2:
            axis.annotate(
                f"{mean:.1%}",
                (100 * mean, row),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                color=color,
                fontweight="bold",
            )
    axis.margins(x=0.12)  # room for what is written
    axis.set_yticks(range(len(ranked)), ranked)
    axis.set_ylim(max(len(ranked), 1) - 0.5, -0.5)
    title = metric_name(headline)
    if len(ranked) == 2:
        best, other = (100 * spread(members[name], headline)[0] for name in ranked)
        title += f": {ranked[0]} {best - other:.1f} points above {ranked[1]}"
    else:
        title += " at the end of training" if ranked else ": every run diverged"
    axis.set_title(_title(title))
    label = f"{metric_name(headline)} (%)"
    if others:
        label += "; filled: moving statistics, open: micro-batch statistics"
    axis.set_xlabel(label)


def draw_curves(axis: Any, members: dict[str, list[Run]], headline: str) -> None:
    """Draws the metric in the course of training, or the training loss where it was
    measured but once, with names at the ends of the lines."""
    tests = [
        sum(headline in line for line in group[0].metrics) for group in members.values()
    ]
    column, factor = (headline, 100.0) if min(tests) > 1 else ("train_loss", 1.0)
    label = f"{metric_name(headline)} (%)" if factor > 1 else "training loss"
    ranked = sorted(members, key=lambda name: _rank(members[name], headline))
    colors = dict(zip(ranked, [*palette(), GREY]))
    ends = []
    for name, group in members.items():
        (line,) = curve(axis, group, column, factor, color=colors[name])
        x, y = line.get_data()
        if len(x):
            ends.append((y[-1], name, colors[name]))
    names_at_ends(axis, ends)
    what = label.removesuffix(" (%)")
    axis.set(xlabel="update", ylabel=label)
    axis.set_title(_title(f"{what} in the course of training"))


def _rank(group: list[Run], headline: str) -> tuple[bool, float]:
    """Sorts ours before the others, each the best first."""
    return not is_ours(group[0].summary["norm"]), -spread(group, headline)[0]


def curve(
    axes: Any,
    runs: Sequence[Run],
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
    mean, sd = np.array([mean_sd(points[step]) for step in steps]).reshape(-1, 2).T
    lines = axes.plot(x, mean, **style)
    low, high = mean - np.nan_to_num(sd), mean + np.nan_to_num(sd)
    axes.fill_between(x, low, high, alpha=0.15, color=lines[0].get_color(), lw=0)
    return lines
