"""Figure 5 of the paper: the gap between the variance that a layer normalises by in
training and the moving one, BN and KN."""

from __future__ import annotations

import csv
import pathlib
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from configs.experiments import cifar10_released
from train.analysis.moments import Layers, collect, restore, variance_gaps
from train.analysis.moments_figure import heat_map
from train.paper import cifar, result
from train.paper.trained import OURS, Request, Series, train_all
from train.studies.figure import palette
from train.studies.runs import Entry, configure

TITLE = "gap of micro-batch and moving variance by layer, BN and KN, small Inception"
ROWS = {"BN": cifar.BN, "KN": cifar.KN, f"KN{OURS}": cifar.KN_OURS}
COLUMN = "mean over all layers"
MICRO_BATCHES = 256

Gaps = dict[str, float]  # layer -> mean of |var - moving| / moving; {}: diverged


def reproduce(name: str, request: Request) -> None:
    """Trains what is missing (the runs of Table 7), measures, prints, and writes.

    The paper prints no number and draws one layer in absolute terms. Ours is the mean
    of |var - moving| / moving over channels and 256 micro-batches of training images;
    NAME_layers.csv has it by layer, the figure also the paper's heat map half-way up.
    """
    full = {
        label: configure(
            cifar10_released.get_config(), Entry(label, keys | cifar.INCEPTION), seed=0
        )
        for label, keys in ROWS.items()
    }
    series = train_all(request, full)
    results, gaps, maps = [], {}, {}
    for label in ROWS:
        found = result.Result(label, COLUMN, "", "ratio")
        if label in series:
            runs = series[label]
            gaps[label], maps[label] = _measure(runs, request.data_dir)
            values = [
                float(np.mean(list(each.values()))) if each else float("nan")
                for each in gaps[label]
            ]
            found = found._replace(values=values, **runs.described())
        results.append(found)
    print(result.table(results))
    result.write(request.folder, name, results, scale=request.scale)
    path = request.folder / f"{name}_layers.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("row", "run", "layer", "gap"))
        for label, runs in gaps.items():
            for number, each in enumerate(runs):
                writer.writerows((label, number, *item) for item in each.items())
    _plot(request.folder / f"{name}.png", gaps, maps)
    print(f"written: {request.folder}/{name}.csv, {name}_layers.csv, .json, .png")


def _measure(
    series: Series, data_dir: str | None
) -> tuple[list[Gaps], dict[str, Layers]]:
    """Returns the gaps of each run, and of one that did not diverge all estimates."""
    gaps, maps = [], {}
    size = series.config.micro_batch_size
    for run, run_dir in zip(series.runs, series.dirs):
        gaps.append({})
        if not run.diverged:
            experiment, config = restore(run_dir, data_dir)
            images = MICRO_BATCHES * size
            _, maps = collect(experiment, config, size, images, MICRO_BATCHES)
            for layer, gap in variance_gaps(maps, "filtered").items():
                gaps[-1][layer] = float(gap.mean())
    return gaps, maps


def _plot(
    path: pathlib.Path, gaps: dict[str, list[Gaps]], maps: dict[str, dict[str, Layers]]
) -> None:
    """Draws the mean gap by layer, and for each normaliser the paper's heat map."""
    with plt.style.context("train.style"):
        figure = _draw(gaps, maps)
        figure.savefig(path)
        plt.close(figure)


def _draw(gaps: dict[str, list[Gaps]], maps: dict[str, dict[str, Layers]]) -> Any:
    panels, colors = 1 + len(ROWS), dict(zip(reversed(ROWS), palette()))
    figure, axes = plt.subplots(1, panels, figsize=(6 * panels, 5))
    for label, runs in gaps.items():
        for each in runs[:1]:
            axes[0].plot(list(each.values()), ".-", color=colors[label], label=label)
    axes[0].set(xlabel="layer", ylabel="mean of |var - moving| / moving", yscale="log")
    axes[0].set_title("Gap of micro-batch and moving variance, by layer")
    for axis, (label, found) in zip(axes[1:], maps.items()):
        if found:
            heat_map(axis, found, "filtered", label)
    if gaps:
        axes[0].legend()
    return figure
