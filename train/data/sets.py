"""The data sets by name: TFDS' own, folders of images, and the embedded digits."""

from __future__ import annotations

import functools
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kalman_flax._filter.state import check_choice
from train.data.batches import Split
from train.data.encoded import Encoded
from train.data.folders import scan
from train.data.pixels import MAX_PIXELS


class Dataset(NamedTuple):
    """A training and a test split: in memory, or too large for that.

    Attributes:
        classes: their names, by label.
        test_name: what the set itself calls its test split.
        version: of a set of TFDS.
        validation: training images that are kept back, to choose settings by.
    """

    train: Split[np.ndarray] | Encoded
    test: Split[np.ndarray] | Encoded
    num_classes: int
    classes: tuple[str, ...] = ()
    test_name: str = "test"
    version: str = ""
    validation: Split[np.ndarray] | None = None


class _Known(NamedTuple):
    """A data set of TFDS: the splits we use, their examples, how to come by it."""

    train: str
    test: str
    examples: tuple[int, int]
    num_classes: int
    size: str
    in_memory: bool = True


_TFDS = {
    "cifar10": _Known("train", "test", (50_000, 10_000), 10, "170 MB to download"),
    "cifar100": _Known("train", "test", (50_000, 10_000), 100, "169 MB to download"),
    "svhn_cropped": _Known(
        "train+extra", "test", (604_388, 26_032), 10, "1.6 GB to download"
    ),
    "imagenet2012": _Known(
        "train",
        "validation",
        (1_281_167, 50_000),
        1000,
        "155 GB to download first, by hand: ILSVRC2012_img_train.tar and"
        " ILSVRC2012_img_val.tar from https://image-net.org/download-images, where you"
        " must register, into DIR/downloads/manual; and as much again for the result",
        in_memory=False,
    ),
}
_DIGITS = (1_500, 297)  # images to train and to test
#: the digits as they are, 8x8, and with pixels four times as high and wide
_DIGITS_SCALE = {"digits": 1, "digits32": 4, "digits32_colour": 4}
_WHITE = 16  # of the pixels of the digits
DATASETS = (*_DIGITS_SCALE, *_TFDS, "folder")


def load_dataset(
    name: str,
    data_dir: str | None = None,
    image_size: int = 224,
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """Loads a data set by name.

    Args:
        name: one of `DATASETS`. ``"folder"`` is any set of images in
            ``DIR/train/CLASS/`` and ``DIR/val/CLASS/``.
        data_dir: that DIR, or the TFDS directory; by default, but not for ``"folder"``,
            the environment's TFDS_DATA_DIR.
        image_size: height and width of the images of ``"imagenet2012"`` and
            ``"folder"``, which stay on disk; other sets come as they are.
        max_pixels: of these, more than which an image may not have.

    Raises:
        ValueError: unknown name, or data of another form than expected.
        FileNotFoundError: the data is not there; the message says how to prepare it.
    """
    check_choice("dataset", name, DATASETS)
    if name in _DIGITS_SCALE:
        return _digits(_DIGITS_SCALE[name], name.endswith("_colour"))
    if name == "folder":
        if not data_dir:
            raise ValueError(
                "dataset is 'folder'; pass --data_dir=DIR, with images in"
                " DIR/train/CLASS/ and DIR/val/CLASS/."
            )
        return _folder(pathlib.Path(data_dir).expanduser(), image_size, max_pixels)
    data_dir = _tfds_dir(data_dir)
    known = _TFDS[name]
    if known.in_memory:
        return _read(name, data_dir)
    train = _Records(name, known.train, data_dir)
    test = _Records(name, known.test, data_dir)
    return Dataset(
        Encoded(train, image_size, len(train), max_pixels),
        Encoded(test, image_size, len(test), max_pixels),
        known.num_classes,
        test.classes,
        known.test,
        train.version,
    )


def check_prepared(name: str, data_dir: str | None = None) -> None:
    """Looks for a data set without reading it.

    Raises:
        FileNotFoundError: it is not there; the message says how to prepare it.
    """
    if name in _TFDS:
        _check_folder(name, _tfds_dir(data_dir))


def examples(name: str) -> tuple[int, int]:
    """Returns how many images a set has to train and to test; not for ``"folder"``."""
    return _DIGITS if name in _DIGITS_SCALE else _TFDS[name].examples


def _tfds_dir(data_dir: str | None) -> str:
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return os.path.expanduser(data_dir)


@functools.cache
def _digits(scale: int, colour: bool) -> Dataset:
    """UCI digits from scikit-learn, 8 x 8 pixels of `scale` x `scale`: the first to
    train, the others to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images[..., None].astype(np.uint8)
    if colour:
        images = _coloured(images)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    labels = digits.target.astype(np.int32)
    train, test = slice(_DIGITS[0]), slice(_DIGITS[0], None)
    return Dataset(
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
        10,
        tuple(map(str, digits.target_names)),
    )


def _coloured(images: np.ndarray) -> np.ndarray:
    """Digits ``[N, H, W, 1]`` in a colour each, on a ground of another, ``[N, H, W,
    3]``: always the same ones."""
    shape = (2, len(images), 1, 1, 3)
    ground, ink = np.random.default_rng(0).integers(256, size=shape)
    return np.rint(ground + (ink - ground) * (images / _WHITE)).astype(np.uint8)


@functools.cache
def _read(name: str, data_dir: str) -> Dataset:
    """Reads a whole set of TFDS into memory."""

    def read(source: Any) -> Split[np.ndarray]:
        shape = source.dataset_info.features["image"].shape
        images = np.empty((len(source), *shape), np.uint8)
        labels = np.empty(len(source), np.int32)
        for i in range(len(source)):
            example = source[i]
            images[i], labels[i] = example["image"], example["label"]
        _check_labels(name, labels, known.num_classes)
        return Split(images, labels)

    known = _TFDS[name]
    train, test = (_open(name, split, data_dir) for split in (known.train, known.test))
    return Dataset(
        read(train),
        read(test),
        known.num_classes,
        _classes(test),
        version=_version(test),
    )


def _check_labels(name: str, labels: np.ndarray, num_classes: int) -> None:
    """Refuses a split without images, and labels that none of the classes has."""
    if not len(labels):
        raise ValueError(f"a split of {name} has no images; prepare it again.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels of {name} run from {labels.min()} to {labels.max()}; expected 0"
            f" to {num_classes - 1}."
        )


def _open(name: str, split: str, data_dir: str, **options: Any) -> Any:
    """Opens TFDS' random-access reader, which needs no TensorFlow."""
    import tensorflow_datasets as tfds

    # Asked for data that is not there, TFDS would start to download it.
    _check_folder(name, data_dir)
    try:
        return tfds.data_source(name, split=split, data_dir=data_dir, **options)
    except NotImplementedError as error:
        raise ValueError(
            f"the files of {name} in {pathlib.Path(data_dir) / name} are not"
            " array_record, which alone can be read in any order. Prepare it again,"
            f" {_command(name)}"
        ) from error


def _classes(source: Any) -> tuple[str, ...]:
    """The names of the classes, which TFDS keeps beside the images."""
    return tuple(source.dataset_info.features["label"].names)


def _version(source: Any) -> str:
    return str(source.dataset_info.version)


def _check_folder(name: str, data_dir: str) -> None:
    folder = pathlib.Path(data_dir) / name
    if not list(folder.glob("*/dataset_info.json")):
        raise FileNotFoundError(
            f"no {name} in {folder}. Prepare it once, {_command(name)}"
        )


def _command(name: str) -> str:
    return (
        "in an environment that has tensorflow and tensorflow-datasets, with\n"
        f"    tfds build {name} --file_format=array_record --data_dir=DIR\n"
        f"({_TFDS[name].size}) and pass --data_dir=DIR or set TFDS_DATA_DIR=DIR."
    )


class _Records(Sequence):
    """The encoded images and labels of a split of TFDS, and their names."""

    def __init__(self, name: str, split: str, data_dir: str):
        import tensorflow_datasets as tfds

        skip = {"image": tfds.decode.SkipDecoding()}
        self._source = _open(name, split, data_dir, decoders=skip)
        self.classes = _classes(self._source)
        self.version = _version(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, example: int) -> tuple[bytes, int, str]:
        found = self._source[example]
        label, name = found["label"], found["file_name"].decode()
        if not 0 <= label < len(self.classes):
            raise ValueError(
                f"the label of {name} is {label}; expected 0 to"
                f" {len(self.classes) - 1}."
            )
        return found["image"], label, name


def _folder(root: pathlib.Path, image_size: int, max_pixels: int) -> Dataset:
    """Images in folders by class; the classes are numbered by name."""
    found = scan(root)
    _say(found.summary)
    train, test = (
        Encoded(files, image_size, len(files), max_pixels)
        for files in (found.train, found.test)
    )
    name = found.test.root.name
    return Dataset(train, test, len(found.classes), found.classes, name)


@functools.cache
def _say(text: str) -> None:
    """Prints, once, on one host."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
