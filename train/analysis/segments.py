"""What a segmentation network gets right: a table by class, as CSV, and a picture."""

from __future__ import annotations

import colorsys
import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import patches
from matplotlib import pyplot as plt
from tabulate import tabulate

from train.data.segments import IGNORE
from train.data.text import pictured, printable
from train.engine.segmentation import Segmentation, Source, iou_and_dice
from train.engine.step import TrainState

#: examples in the picture, and classes in its legend
SHOWN, MOST_NAMES = 8, 30
_IGNORED = np.array((255, 255, 255), np.uint8)
#: of a circle, from the colour of a class to that of the next
_GOLDEN = 0.618034


def numbers(
    task: Segmentation,
    state: TrainState,
    split: Source,
    others: Mapping[str, TrainState],
) -> str:
    """Returns a line of mIoU, Dice, accuracy and loss for each kind of statistics.

    Args:
        task: of the run.
        state: its last.
        split: the images.
        others: states with other moving statistics, by what to call them.
    """
    found = task.evaluate(state, split)
    lines = [
        (found, "moving", "A, moving statistics"),
        (found, "batch", "B, micro-batch statistics"),
    ]
    lines += [
        (task.evaluate(other, split), "moving", name) for name, other in others.items()
    ]
    shown = ["  mIoU    Dice  accuracy    loss  normalised by"]
    for values, kind, name in lines:
        miou, dice, accuracy, loss = (
            values[f"{kind}_{key}"] for key in ("miou", "dice", "accuracy", "loss")
        )
        shown.append(f"{miou:6.4f}  {dice:6.4f}  {accuracy:8.2%}  {loss:6.4f}  {name}")
    return "\n".join(shown)


def by_class(
    task: Segmentation, state: TrainState, split: Source, to: pathlib.Path
) -> str:
    """Returns a table of IoU and Dice of each class under both options, and writes it
    as `to` .csv, and the first predictions beside the truth as `to` .png."""
    classes, found = task.data.classes, task.confusion(state, split)
    columns, cells = rows({"A": found["moving"], "B": found["batch"]}, classes)
    with to.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *cells])
    some = split.read(np.arange(min(SHOWN, split.examples)))
    predicted = task.predict(state, some.images)
    plot(to.with_suffix(".png"), some.images, some.labels, predicted, classes)
    # Nothing is known of a class that is neither there nor predicted.
    shown = [
        [label, pixels, *("-" if np.isnan(x) else f"{x:.3f}" for x in values)]
        for label, pixels, *values in cells
    ]
    aligned = ("left", *["right"] * (len(columns) - 1))
    return tabulate(shown, columns, disable_numparse=True, colalign=aligned)


def rows(
    confusions: Mapping[str, np.ndarray], classes: Sequence[str]
) -> tuple[list[str], list[list[Any]]]:
    """Returns names of columns and a row of each class: its pixels, IoU and Dice.

    Args:
        confusions: by what images are normalised by, of each class (row) the pixels
            taken for each (column).
        classes: their names.
    """
    shares = {name: iou_and_dice(found) for name, found in confusions.items()}
    columns = ["class", "pixels"]
    columns += [f"{what} {name}" for name in shares for what in ("IoU", "Dice")]
    pixels = next(iter(confusions.values())).sum(1)
    return columns, [
        [printable(label), int(pixels[i])]
        + [float(each[i]) for pair in shares.values() for each in pair]
        for i, label in enumerate(classes)
    ]


def plot(
    path: pathlib.Path,
    images: np.ndarray,
    truth: np.ndarray,
    predicted: np.ndarray,
    classes: Sequence[str],
) -> None:
    """Draws images, the truth and what was predicted, side by side.

    Args:
        path: of the PNG.
        images: ``[N, H, W, 3]`` uint8.
        truth, predicted: labels ``[N, H, W]``; where the truth is `IGNORE`, both are
            white.
        classes: their names.
    """
    colours = np.array([_colour(label) for label in range(len(classes))], np.uint8)
    ignored = truth == IGNORE

    def painted(labels: np.ndarray) -> np.ndarray:
        painted = colours[np.where(ignored, 0, labels)]
        return np.where(ignored[..., None], _IGNORED, painted)

    columns = {
        "image": images,
        "truth": painted(truth),
        "predicted": painted(predicted),
    }
    figure, axes = plt.subplots(
        len(images), 3, figsize=(7, 2 * len(images) + 0.5), squeeze=False
    )
    for column, (title, drawn) in enumerate(columns.items()):
        axes[0, column].set_title(title)
        for axis, picture in zip(axes[:, column], drawn):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
    handles = [
        patches.Patch(facecolor=colours[label] / 255, label=pictured(name))
        for label, name in enumerate(classes[:MOST_NAMES])
    ]
    figure.tight_layout(rect=(0, 0, 0.82, 1))
    figure.legend(handles=handles, loc="upper right", fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _colour(label: int) -> tuple[int, ...]:
    """Black for the first class, for that is what most call the background."""
    value = 0.95 if label else 0.0
    rgb = colorsys.hsv_to_rgb(label * _GOLDEN % 1, 0.75, value)
    return tuple(round(255 * channel) for channel in rgb)
