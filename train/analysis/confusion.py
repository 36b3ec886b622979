"""The confusion matrix of a trained network, as CSV and as a picture."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

#: more could not be read in a picture
MOST_CLASSES = 100
#: up to so many, the picture has the numbers in it
MOST_NUMBERS = 20


def write_csv(path: pathlib.Path, counts: np.ndarray, names: Sequence[str]) -> None:
    """Writes the images ``[classes, classes]`` of each true class, a row, that were
    taken for each, a column."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *names])
        writer.writerows(
            [name, *row] for name, row in zip(names, counts.tolist(), strict=True)
        )


def plot(
    path: pathlib.Path, counts: np.ndarray, names: Sequence[str], title: str
) -> None:
    """Draws them: the colour is the share of the true class, numbers are images."""
    classes = len(counts)
    images = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(images, 1)  # a class may have none
    side = min(16.0, 3.5 + 0.45 * classes)
    figure, axes = plt.subplots(figsize=(side + 1, side))
    picture = axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)
    size = 10 if classes <= MOST_NUMBERS else 6
    axes.set_xticks(range(classes), names, rotation=90, fontsize=size)
    axes.set_yticks(range(classes), names, fontsize=size)
    axes.set(title=title, xlabel="predicted", ylabel="true")
    if classes <= MOST_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, count, ha="center", va="center", color=color)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
