"""The confusion matrix of a trained network, as CSV and as a picture."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from sklearn.metrics import ConfusionMatrixDisplay

from train.data.text import pictured, printable

#: more could not be read in a picture
MOST_CLASSES = 100
#: up to so many, the picture has the numbers in it
MOST_NUMBERS = 20


def write_csv(path: pathlib.Path, counts: np.ndarray, names: Sequence[str]) -> None:
    """Writes the images ``[classes, classes]`` of each true class, a row, that were
    taken for each, a column."""
    names = list(map(printable, names))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *names])
        writer.writerows(
            [name, *row] for name, row in zip(names, counts.tolist(), strict=True)
        )


def plot(
    path: pathlib.Path, counts: np.ndarray, names: Sequence[str], title: str
) -> None:
    """Draws them: the colour is the share of the true class, numbers are images."""
    with plt.style.context("train.style"):
        figure = _draw(counts, names, title)
        figure.savefig(path)
        plt.close(figure)


def _draw(counts: np.ndarray, names: Sequence[str], title: str) -> Any:
    classes = len(counts)
    images = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(images, 1)  # a class may have none
    side = min(16.0, 3.5 + 0.45 * classes)
    figure, axes = plt.subplots(figsize=(side + 1, side))
    few = classes <= MOST_NUMBERS
    display = ConfusionMatrixDisplay(
        share, display_labels=list(map(pictured, names))
    ).plot(
        include_values=few,
        cmap="Blues",
        xticks_rotation="vertical",
        ax=axes,
        colorbar=False,
        im_kw={"vmin": 0, "vmax": 1},
    )
    for text, count in zip(display.text_.flat if few else (), counts.flat):
        text.set_text(count)
    axes.tick_params(labelsize=10 if few else 6)
    figure.colorbar(display.im_, label="share of the true class", shrink=0.8)
    axes.set(title=title, xlabel="predicted", ylabel="true")
    axes.grid(visible=False)  # lines would cross the cells
    return figure
