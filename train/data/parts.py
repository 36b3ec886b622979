"""Parts of a data set: some of its classes, and images kept back to choose by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.data.batches import Split
from train.data.encoded import Encoded
from train.data.sets import Dataset


def part_of(dataset: Dataset, config: Any) -> Dataset:
    """Returns the part of a data set that a config asks for.

    Of ``config.classes`` alone, the first ``train_examples`` and ``test_examples``, and
    the last ``validation_examples`` of the training images as `Dataset.validation`.

    Raises:
        ValueError: there are not so many, or not such; or it needs images in memory,
            and those of this set are not.
    """
    if config.classes:
        dataset = of_classes(dataset, config.classes)
    validation, train = None, dataset.train
    if kept := config.validation_examples:
        train = _in_memory(train, "validation_examples")
        rest = train.examples - kept
        if rest < max(1, config.train_examples):
            raise ValueError(
                f"validation_examples {kept:,} of {train.examples:,} training images"
                f" leave {max(rest, 0):,} to train on; expected to leave"
                f" {config.train_examples or 'some'}."
            )
        validation = Split(*(array[rest:] for array in train))
        train = train.take(rest)
    return dataset._replace(
        train=train.take(config.train_examples),
        test=dataset.test.take(config.test_examples),
        validation=validation,
    )


def of_classes(dataset: Dataset, classes: Sequence[int]) -> Dataset:
    """Returns a data set of some classes, in this order labelled from 0.

    Args:
        dataset: in memory.
        classes: by label, two or more.

    Raises:
        ValueError: they are not that; or the images are not in memory.
    """
    known = range(dataset.num_classes)
    if len(set(classes)) < max(2, len(classes)) or not set(classes) <= set(known):
        raise ValueError(
            f"classes is {tuple(classes)}; expected two or more different labels from 0"
            f" to {dataset.num_classes - 1}."
        )
    new = np.full(dataset.num_classes, -1, np.int32)
    new[list(classes)] = np.arange(len(classes))

    def choose(split: Split[np.ndarray] | Encoded) -> Split[np.ndarray]:
        split = _in_memory(split, "classes")
        labels = new[split.labels]
        return Split(split.images[labels >= 0], labels[labels >= 0])

    return dataset._replace(
        train=choose(dataset.train),
        test=choose(dataset.test),
        num_classes=len(classes),
        classes=tuple(dataset.classes[label] for label in classes),
    )


def _in_memory(split: Split[np.ndarray] | Encoded, key: str) -> Split[np.ndarray]:
    if isinstance(split, Split):
        return split
    raise ValueError(
        f"{key} is for data sets in memory; the images of this one stay on disk. Put"
        " those that you want into a folder of their own."
    )
