"""Figures of how well the filter knows the statistics."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib
import numpy as np

from train.analysis.moments import ERRORS, ESTIMATES, Layers, variance_gaps

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

TITLES = {
    "mean_error": "Error of the mean",
    "variance_error": "Error of the variance",
    "relative_error": "Error of the variance among channels",
}
#: unlike each other where they lie upon each other
STYLES = {
    "observed": {"marker": "o"},
    "predicted": {"lw": 4, "alpha": 0.4},
    "filtered": {"ls": "--"},
    "moving": {"ls": ":", "color": "black"},
}


def plot(
    path: pathlib.Path,
    rows: list[dict[str, Any]],
    summary: list[dict[str, Any]],
    maps: dict[str, Layers],
    size: int,
) -> None:
    """Draws the errors by micro-batch size and, at `size`, by layer; and from `maps`,
    the estimates at `size`, the paper's Fig. 5: the gap between the variance used and
    the moving one, micro-batches by channels."""
    with plt.style.context("train.style"):
        figure = _draw(rows, summary, maps, size)
        figure.savefig(path)
        plt.close(figure)


def _draw(
    rows: list[dict[str, Any]],
    summary: list[dict[str, Any]],
    maps: dict[str, Layers],
    size: int,
) -> Any:
    figure, axes = plt.subplots(2, 4, figsize=(20, 8.5))
    sizes = sorted({line["micro_batch_size"] for line in summary})
    depths = [row for row in rows if row["micro_batch_size"] == size]
    for column, (name, title) in enumerate(ERRORS.items()):
        for kind in ESTIMATES:
            errors_ = [line[name] for line in summary if line["estimate"] == kind]
            axes[0, column].plot(sizes, errors_, label=kind, **STYLES[kind])
            points = [row for row in depths if row["estimate"] == kind]
            axes[1, column].plot(
                [row["depth"] for row in points],
                [row[name] for row in points],
                **STYLES[kind],
            )
        axes[0, column].set(xscale="log", yscale="log", xlabel="micro-batch size")
        axes[0, column].set_xticks(sizes, [str(size) for size in sizes])
        axes[1, column].set(xlabel=f"layer, at micro-batch {size}", yscale="log")
        axes[1, column].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0, column].tick_params(axis="x", which="minor", bottom=False)
        axes[0, column].set_title(TITLES[name])
        for axis in axes[:, column]:
            axis.set_ylabel(f"RMS of {title}")
    axes[0, 0].legend()
    for axis, kind in zip(axes[:, -1], ("observed", "filtered")):
        heat_map(axis, maps, kind, kind)
    return figure


def heat_map(axis: Any, maps: dict[str, Layers], kind: str, title: str) -> None:
    """Draws the `variance_gaps` of the layer half-way up, micro-batches by channels."""
    gaps = variance_gaps(maps, kind)
    layer = list(gaps)[len(gaps) // 2]
    image = axis.imshow(gaps[layer].T, aspect="auto", vmin=0, vmax=1)
    axis.set(title=f"{title}: |var - moving| / moving, {layer}")
    axis.set(xlabel="micro-batch", ylabel="channel")
    axis.grid(visible=False)
    axis.figure.colorbar(image, ax=axis)


def plot_gains(path: pathlib.Path, gains: dict[str, np.ndarray]) -> None:
    """Draws the gain of every layer, or the spread of those of its channels."""
    with plt.style.context("train.style"):
        figure, axes = plt.subplots(figsize=(8, 0.3 * len(gains) + 1.5))
        axes.boxplot(list(gains.values()), orientation="horizontal", whis=(0, 100))
        axes.set_yticks(range(1, len(gains) + 1), list(gains))
        axes.invert_yaxis()
        axes.set(xlabel="gain q, the weight of the observation", xlim=(0, None))
        axes.set_title("Learned gains, by layer")
        figure.savefig(path)
        plt.close(figure)
