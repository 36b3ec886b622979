"""Folders of images and masks: ``train/images/X.jpg`` with ``train/masks/X.png``.

A mask is a PNG of one channel, whose numbers are the labels of the pixels; `IGNORE` is
none. Splits are ``train/`` and ``val/``, ``validation/`` or ``test/``. The classes are
the lines of ``classes.txt``, by label.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import PIL
from PIL import Image

from train.data.batches import Split, first
from train.data.check import THREADS
from train.data.encoded import Box, random_box
from train.data.files import Found
from train.data.folders import SHOWN, TEST_FOLDERS
from train.data.names import IMAGES, is_hidden, suffix
from train.data.pixels import open_image, orientation, to_rgb
from train.data.segments import IGNORE

CLASSES = "classes.txt"
#: kinds of PNG whose numbers are taken as they are
_MODES = ("1", "L", "P", "I;16")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A split whose images and masks are files, read and decoded one by one.

    Attributes:
        root: of the split; ``images/`` and ``masks/`` are in it.
        found: the image and the mask of each example.
        image_size: height and width that they are cropped and resized to.
        classes: their number.
        max_pixels: larger images are refused before they are decoded.
    """

    root: pathlib.Path
    found: tuple[tuple[Found, Found], ...]
    image_size: int
    classes: int
    max_pixels: int

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.found)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of each image, ``[H, W, C]``."""
        return (self.image_size, self.image_size, 3)

    def take(self, examples: int) -> Pairs:
        """Returns the first so many examples; all of them for 0.

        Raises:
            ValueError: there are fewer.
        """
        count = first(examples, self.examples)
        return dataclasses.replace(self, found=self.found[:count])

    def read(
        self, index: np.ndarray, key: Sequence[int] | None = None
    ) -> Split[np.ndarray]:
        """Returns the examples `index`, decoded.

        Args:
            index: ``[N]``.
            key: of random crops, as in `train.data.encoded.Encoded.read`. Without it
                they are whole: the longer side fills the square, and below or beside
                them is black, and `IGNORE`.

        Raises:
            ValueError: a pair that cannot be used; the message names it.
        """
        images = np.zeros((len(index), *self.image_shape), np.uint8)
        labels = np.full(images.shape[:3], IGNORE, np.uint8)
        for row, example in enumerate(index.tolist()):
            image, mask = self.decode(example)
            box, size = (0, 0, *image.size), self._fitted(*image.size)
            if key is not None:
                random = np.random.default_rng((*key, example))
                box = random_box(random)(*image.size)
                size = self.image_size, self.image_size
            width, height = size
            images[row, :height, :width] = _cut(image, box, size, "BILINEAR")
            labels[row, :height, :width] = _cut(mask, box, size, "NEAREST")
        return Split(images, labels)

    def _fitted(self, width: int, height: int) -> tuple[int, int]:
        scale = self.image_size / max(width, height)
        return max(1, round(scale * width)), max(1, round(scale * height))

    def decode(self, example: int) -> tuple[Image.Image, Image.Image]:
        """Returns image and mask as they are, RGB and labels.

        Raises:
            ValueError: a pair that cannot be used; the message names it.
        """
        image, mask = (self.root / file.path for file in self.found[example])
        try:
            with open_image(image, self.max_pixels) as opened:
                pixels = to_rgb(opened)
        except Exception as error:  # Pillow has many, by format
            raise ValueError(f"image {image} cannot be decoded: {error}") from error
        return pixels, Image.fromarray(self._labels(mask, pixels.size))

    def check(self, example: int) -> None:
        """Raises a ValueError, that names the file, unless a pair can be used. Decodes
        the mask alone."""
        image, mask = (self.root / file.path for file in self.found[example])
        try:
            with open_image(image, self.max_pixels) as opened:
                turn = slice(None, None, -1 if orientation(opened) >= 5 else 1)
                size = opened.size[turn]
        except Exception as error:
            raise ValueError(f"image {image} cannot be used: {error}") from error
        self._labels(mask, size)

    def _labels(self, path: pathlib.Path, size: tuple[int, ...]) -> np.ndarray:
        """Reads a mask, ``[H, W]`` uint8, for an image of `size`, width and height."""
        try:
            with open_image(path, self.max_pixels) as opened:
                mode, found = opened.mode, opened.size
                labels = np.asarray(opened) if mode in _MODES else None
        except Exception as error:
            raise ValueError(f"mask {path} cannot be decoded: {error}") from error
        if labels is None:
            raise ValueError(
                f"mask {path} has colours of the kind {mode}; expected one number a"
                " pixel, its label: save it as PNG of one channel, or with a palette."
            )
        if found != tuple(size):
            raise ValueError(
                f"mask {path} is {found[0]} x {found[1]} pixels, its image {size[0]} x"
                f" {size[1]}; expected one size."
            )
        labels = labels.astype(np.int64)
        if beyond := sorted(
            {*np.unique(labels).tolist()} - {*range(self.classes)} - {IGNORE}
        ):
            raise ValueError(
                f"mask {path} has labels {_few(map(str, beyond))}; expected 0 to"
                f" {self.classes - 1}, of the {self.classes} classes in {CLASSES}, or"
                f" {IGNORE} for what does not count."
            )
        return labels.astype(np.uint8)

    def describe(self) -> dict[str, Any]:
        """Returns what to know the split by, see `train.data.fingerprint`."""
        paths = sorted(f"{f.path}\0{f.size}" for pair in self.found for f in pair)
        text = "\n".join(paths).encode(errors="surrogateescape")
        return {
            "images": self.examples,
            "shape": list(self.image_shape),
            "dtype": "uint8",
            "sha256": hashlib.sha256(text).hexdigest(),
        }


def _cut(image: Image.Image, box: Box, size: tuple[int, int], how: str) -> np.ndarray:
    return np.asarray(image.resize(size, Image.Resampling[how], box=box))


def find_pairs(
    root: pathlib.Path, image_size: int, max_pixels: int
) -> tuple[Pairs, Pairs, tuple[str, ...], str]:
    """Looks for the images and masks of both splits, and opens none.

    Returns:
        Splits to train and to test on, the names of the classes, and that of the test
        split.

    Raises:
        FileNotFoundError: folders or files are missing.
        ValueError: images without masks, masks without images, two of one name; too
            few classes, or too many.
    """
    test = next((name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if test is None or not (root / "train").is_dir():
        raise FileNotFoundError(
            f"expected the folders train and {' or '.join(TEST_FOLDERS)} in {root},"
            " each with images/ and masks/."
        )
    classes = _classes(root / CLASSES)
    train_split, test_split = (
        Pairs(root / name, _pairs(root / name), image_size, len(classes), max_pixels)
        for name in ("train", test)
    )
    return train_split, test_split, classes, test


def _classes(path: pathlib.Path) -> tuple[str, ...]:
    if not path.exists():
        raise FileNotFoundError(
            f"no {path}; expected the names of the classes, one a line: of label 0, of"
            " label 1 and so on."
        )
    names = tuple(filter(None, map(str.strip, path.read_text("utf-8").splitlines())))
    if not 2 <= len(names) <= IGNORE or len({*names}) < len(names):
        raise ValueError(
            f"{path} has {len(names)} names of classes, {len({*names})} of them"
            f" different; expected 2 to {IGNORE}, all different."
        )
    return names


def _pairs(root: pathlib.Path) -> tuple[tuple[Found, Found], ...]:
    images, masks = (_by_stem(root, name) for name in ("images", "masks"))
    for these, those, what in ((images, masks, "masks"), (masks, images, "images")):
        if lonely := sorted(these[stem].path for stem in these.keys() - those.keys()):
            raise ValueError(
                f"files of {root} without {what} of the same name: {_few(lonely)}."
            )
    if not images:
        raise FileNotFoundError(f"no images in {root / 'images'}.")
    # The first so many examples are to be of all kinds, as in `Files`.
    stems = sorted(images)
    order = np.random.default_rng(0).permutation(len(stems))
    return tuple((images[stems[i]], masks[stems[i]]) for i in order)


def _by_stem(root: pathlib.Path, name: str) -> dict[str, Found]:
    """Returns the images of a folder by their names without ends."""
    if not (root / name).is_dir():
        raise FileNotFoundError(f"no folder {root / name}.")
    found: dict[str, Found] = {}
    for entry in sorted(os.scandir(root / name), key=lambda entry: entry.name):
        if is_hidden(entry.name) or suffix(entry.name) not in IMAGES:
            continue
        stem, stat = entry.name.rpartition(".")[0], entry.stat()
        if stem in found:
            raise ValueError(
                f"{root / name} has two files {stem}: {found[stem].path} and"
                f" {name}/{entry.name}."
            )
        found[stem] = Found(f"{name}/{entry.name}", stat.st_size, stat.st_mtime_ns)
    return found


def check_pairs(
    splits: Iterable[Pairs], checked: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Opens all files of the splits, and decodes the masks.

    Args:
        splits: of `find_pairs`.
        checked: what an earlier call returned: splits whose files have not changed
            since are left out.

    Returns:
        By split a hash of the paths, sizes and times of change of its files.

    Raises:
        ValueError: files that cannot be used; the message has the first of them, and
            how many there are.
    """
    digests = {split.root.name: (_digest(split), split) for split in splits}
    bad: list[str] = []
    with ThreadPoolExecutor(THREADS) as threads:
        for name, (digest, split) in digests.items():
            if (checked or {}).get(name) != digest:
                look = functools.partial(_look, split)
                bad += filter(None, threads.map(look, range(split.examples)))
    if bad:
        raise ValueError(
            f"{len(bad):,} pairs of images and masks cannot be used; mend them or take"
            f" them away:\n  " + "\n  ".join(bad[:SHOWN])
        )
    return {name: digest for name, (digest, _) in digests.items()}


def _look(split: Pairs, example: int) -> str:
    try:
        split.check(example)
    except ValueError as error:
        return str(error)
    return ""


def _digest(split: Pairs) -> str:
    """Of everything that what we find hangs on."""
    parts = (PIL.__version__, split.max_pixels, split.classes, split.found)
    text = repr(parts).encode(errors="surrogateescape")
    return hashlib.sha256(text).hexdigest()


def _few(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
