"""The image files of a split, in the order in which they are numbered."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Found(NamedTuple):
    """An image file.

    Attributes:
        path: within the split, with "/".
        size: in bytes.
        changed: when, in nanoseconds.
    """

    path: str
    size: int
    changed: int


class Files(Sequence):
    """The image files of a split: for each its bytes, its label and its path.

    Attributes:
        root: the folder of the split.
        found: the files, in the order in which they are numbered.
        labels: ``[N]`` int32.
    """

    def __init__(self, root: pathlib.Path, by_class: dict[str, list[Found]]):
        found = [file for files in by_class.values() for file in files]
        labels = np.repeat(np.arange(len(by_class)), [*map(len, by_class.values())])
        # The first so many examples, and micro-batches of the test split, are to be of
        # all classes, as in sets of TFDS.
        order = np.random.default_rng(0).permutation(len(found))
        self.root = root
        self.found = [found[i] for i in order]
        self.labels = labels[order].astype(np.int32)

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, example: int) -> tuple[bytes, int, str]:
        path = self.path(example)
        with open(path, "rb") as file:
            return file.read(), int(self.labels[example]), path

    def path(self, example: int) -> str:
        """Returns where the file is."""
        return f"{self.root}/{self.found[example].path}"
