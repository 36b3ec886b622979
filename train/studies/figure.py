"""The pictures of a comparison, each of one thing.

A line or a dot is a mean over seeds, a bar or a band one sample standard deviation.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from train.studies.report import Run, groups, headline_of, mean_sd, metric_name, options
from train.studies.report import spread

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
    values: dict[int, Sequence[float]]
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
    members = {
        f"{variant}, {micro}" if _several(runs, variant) else variant: alive
        for (variant, micro), group in groups(runs).items()
        if (alive := [run for run in group if not run.diverged])
    }
    if not members:
        return
    sizes = {run.summary["micro_batch_size"] for run in runs}
    by_size = len(sizes) > 1 and len(lines := _lines(members)) < len(members)
    curves = len(members) <= MOST_CURVES and len(members) > 0
    headline = headline_of(runs)
    title = metric_name(headline)
    height = 4.5 if by_size else max(3.2, 0.27 * len(members) + 1.2)
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(
            1, 1 + curves, figsize=(7 + 5 * curves, height), squeeze=False
        )
        first, *rest = axes[0]
        if by_size:
            draw_by_size(first, lines, colored_lines(lines))
            first.set(
                title=f"{title} by micro-batch size".capitalize(),
                ylabel=f"{title} (%)",
            )
        else:
            draw_dots(first, members, headline)
        for axis in rest:
            draw_curves(axis, members, headline)
        figure.savefig(path)
        plt.close(figure)


def save_by_size(
    path: pathlib.Path, lines: Sequence[Line], colored: Sequence[str], title: str
) -> None:
    """Draws accuracies by micro-batch size; `colored` are named, ours first."""
    with plt.style.context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 5.2))
        draw_by_size(axis, lines, dict(zip(colored, _palette())))
        axis.set(title=title, ylabel="test accuracy (%)")
        figure.savefig(path)
        plt.close(figure)


def _several(runs: Iterable[Run], variant: str) -> bool:
    sizes = {
        run.summary["micro_batch_size"]
        for run in runs
        if run.summary["variant"] == variant
    }
    return len(sizes) > 1


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
    return [Line(name, ours, sizes) for (name, ours), sizes in values.items()]


def colored_lines(lines: Sequence[Line]) -> dict[str, str]:
    """Returns the colours of our best line, of batch norm and of the best rivals, by
    the smallest micro-batch; the names that are not there are grey."""
    ranked = sorted(lines, key=lambda line: -line.rank)
    ours = [line.name for line in ranked if line.ours][:1]
    rivals = [line.name for line in ranked if not line.ours]
    known = [name for name in rivals if name in ("batch", "batch norm")]
    rivals = (known + [name for name in rivals if name not in known])[:RIVALS]
    colors = _palette()
    # Ours has the first colour, also where there is none of ours.
    return dict(zip(ours, colors)) | dict(zip(rivals, colors[1:]))


def _palette() -> list[str]:
    return plt.rcParams["axes.prop_cycle"].by_key()["color"]


def draw_by_size(axis: Any, lines: Sequence[Line], colors: dict[str, str]) -> None:
    """Draws lines over a logarithmic axis of micro-batch sizes; those in `colors` have
    their names at their ends, the others are grey."""
    sizes = sorted({size for line in lines for size in line.values})
    ends = []
    for line in sorted(lines, key=lambda line: line.name in colors):
        x, mean, deviation = line.points()
        if line.flat:
            x, mean = np.array([sizes[0], sizes[-1]]), np.repeat(mean[:1], 2)
            deviation = np.repeat(deviation[:1], 2)
        color = colors.get(line.name, GREY)
        named = line.name in colors
        axis.errorbar(
            x,
            mean,
            deviation,
            fmt="--" if line.flat else "o-",
            color=color,
            lw=(2.6 if line.ours else 2.0) if named else 1.0,
            markersize=5 if named else 3,
            elinewidth=1.2 if named else 0.7,
            zorder=3 if named else 2,
            alpha=1.0 if named else 0.8,
        )
        if named:
            ends.append((x[-1], mean[-1], line.name, color))
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_xlabel("micro-batch size (examples that share statistics)")
    names_at_ends(axis, ends)
    if len(lines) > len(colors):
        axis.plot([], [], color=GREY, lw=1.0, label="others")
        axis.legend(loc="lower right")


def names_at_ends(
    axis: Any, ends: Iterable[tuple[float, float, str, str]], gap: float = 0.055
) -> None:
    """Writes names right of the points (x, y, name, colour), `gap` of the axis apart."""
    low, high = axis.get_ylim()
    right = axis.transAxes
    heights: list[float] = []
    ends = sorted(ends, key=lambda end: end[1])
    for _, y, _, _ in ends:
        at = (y - low) / (high - low)
        heights.append(max(at, heights[-1] + gap) if heights else at)
    if heights and heights[-1] > 1:  # no name above the picture
        top = 1.0
        for i in reversed(range(len(heights))):
            heights[i] = top = min(heights[i], top)
            top -= gap
    for (_, _, name, color), at in zip(ends, heights):
        axis.annotate(
            name,
            (1.0, at),
            xycoords=right,
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="bold",
            fontsize="small",
            annotation_clip=False,
        )


def draw_dots(axis: Any, members: dict[str, list[Run]], headline: str) -> None:
    """Draws what each came to at the end as a dot, the best first, option B open where
    it is another; of two the gap between them is written."""
    ranked = sorted(members, key=lambda name: -spread(members[name], headline)[0])
    option_a, *others = options(headline)
    ours, rival = _palette()[:2]
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
    axis.set_yticks(range(len(ranked)), ranked)
    axis.set_ylim(len(ranked) - 0.5, -0.5)
    axis.grid(axis="x", visible=True)
    title = metric_name(headline)
    if len(ranked) == 2:
        best, other = (100 * spread(members[name], headline)[0] for name in ranked)
        title += f": {ranked[0]} {best - other:.1f} points above {ranked[1]}"
    else:
        title += " at the end of training"
    axis.set_title(title[0].upper() + title[1:])
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
    colors = dict(zip(_ours_first(members), (_palette() + [GREY])))
    ends = []
    for name, group in members.items():
        (line,) = curve(axis, group, column, factor, color=colors[name])
        x, y = line.get_data()
        if len(x):
            ends.append((x[-1], y[-1], name, colors[name]))
    names_at_ends(axis, ends)
    what = label.removesuffix(" (%)")
    axis.set(xlabel="update", ylabel=label)
    axis.set_title(f"{what} in the course of training".capitalize())


def _ours_first(members: dict[str, list[Run]]) -> list[str]:
    return sorted(
        members, key=lambda name: not is_ours(members[name][0].summary["norm"])
    )


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
