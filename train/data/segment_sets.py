"""Images with a label for every pixel, by name: digit scenes, or pairs of files."""

from __future__ import annotations

import functools
import pathlib
from typing import Literal, NamedTuple

import numpy as np

from train.data import scenes
from train.data.batches import Split
from train.data.pairs import Pairs, find_pairs

DATASETS = ("scenes", "pairs")
#: scenes to train and to test on, where a config asks for no number
EXAMPLES = 1_500, 300


class SegmentData(NamedTuple):
    """A training and a test split.

    Attributes:
        classes: their names, by label.
        test_name: what the set itself calls its test split.
        version: as of `train.data.sets.Dataset`.
    """

    train: Split[np.ndarray] | Pairs
    test: Split[np.ndarray] | Pairs
    classes: tuple[str, ...]
    test_name: str = "test"
    version: str = ""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def load_segments(
    name: str,
    data_dir: str | None,
    image_size: int,
    examples: tuple[int, int],
    max_pixels: int,
) -> SegmentData:
    """Loads one of `DATASETS`.

    Args:
        name: ``"scenes"``, see `make_scenes`; or ``"pairs"``, see `find_pairs`.
        data_dir: where pairs are.
        image_size: height and width of what is trained and tested on.
        examples: how many to train and to test on; 0 for all, or `EXAMPLES`.
        max_pixels: of a file, more than which an image may not have.

    Raises:
        ValueError: files that cannot be meant.
        FileNotFoundError: there are none.
    """
    if name == "scenes":
        train, test = (
            _scenes(split, count or default, image_size)
            for split, count, default in zip(scenes.SPLITS, examples, EXAMPLES)
        )
        return SegmentData(train, test, scenes.CLASSES)
    if not data_dir:
        raise ValueError(
            "dataset is 'pairs'; pass --data_dir=DIR, with DIR/train/images/X.jpg and"
            " DIR/train/masks/X.png, the same in DIR/val/, and DIR/classes.txt."
        )
    root = pathlib.Path(data_dir).expanduser()
    train, test, classes, name = find_pairs(root, image_size, max_pixels)
    train, test = (split.take(count) for split, count in zip((train, test), examples))
    return SegmentData(train, test, classes, name)


@functools.cache
def _scenes(
    split: Literal["train", "test"], examples: int, size: int
) -> Split[np.ndarray]:
    made = scenes.make_scenes(split, examples, size)
    return Split(made.images, made.labels)
