"""Digit scenes: made images of which every pixel's class, and every object, is known.

The UCI digits lie at random sizes and places on a smooth coloured background. Images
differ in exposure, so that the statistics of one say little of the next. The constants
below were fixed before any normalisers were compared.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from kalman_flax._filter.state import check_choice
from train.data.sets import load_dataset

SPLITS: tuple[Literal["train"], Literal["test"]] = ("train", "test")
#: by label; the digit d has the label d + 1
CLASSES = ("background", *map(str, range(10)))

#: digits a scene, from and to
COUNT = (2, 6)
#: height and width of a digit, from and to, where the scene has 64 pixels
SIZE = (12, 28)
#: of the ink of a pixel, from 0 to 1, beyond which it belongs to the digit
INK = 0.45
#: of its pixels that no other digit covers
VISIBLE = 0.5
#: places that are tried for a digit, which is left out when none leaves all visible
TRIES = 20
#: random colours a side, between which the background is smooth, and how far each
#: channel of them is from the background's mean, at most
CORNERS, VARIATION = 3, 0.2
#: by which a digit's colour differs from the background at its place, at least, in one
#: of the three channels
CONTRAST = 0.5
#: standard deviation of the logarithm of an image's gain, and the gain's median
GAIN, EXPOSURE = 0.35, 0.6
#: standard deviation of each channel of each pixel
NOISE = 0.03


class Instances(NamedTuple):
    """The digits of a scene, of each the part that is visible.

    Attributes:
        boxes: ``[n, 4]`` float32: x1, y1, x2, y2 in pixels, around the mask: a mask of
            one pixel in the corner has the box 0, 0, 1, 1.
        labels: ``[n]`` int32, from 1 to 10: see `CLASSES`.
        masks: ``[n, H, W]`` bool; no pixel is in two.
    """

    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


class Scenes(NamedTuple):
    """Scenes with what is on them.

    Attributes:
        images: ``[N, H, W, 3]`` uint8.
        labels: the class of each pixel, ``[N, H, W]`` uint8: see `CLASSES`.
        instances: of each scene.
    """

    images: np.ndarray
    labels: np.ndarray
    instances: tuple[Instances, ...]


def make_scenes(
    split: Literal["train", "test"], examples: int, size: int = 64, seed: int = 0
) -> Scenes:
    """Makes scenes; the first of many are those of few.

    Args:
        split: ``"train"`` or ``"test"``, which have no digit in common.
        examples: their number, N.
        size: H and W; digits grow with it.
        seed: of everything random.

    Raises:
        ValueError: another split; a size at which digits are smaller than they came.
    """
    check_choice("split", split, SPLITS)
    if size * SIZE[0] < 64 * 8:
        raise ValueError(f"size is {size}; expected 43 or more.")
    digits = getattr(load_dataset("digits"), split)
    ink = digits.images[..., 0].astype(np.float32) / 16
    made = [
        _scene(
            np.random.default_rng((seed, SPLITS.index(split), i)),
            ink,
            digits.labels,
            size,
        )
        for i in range(examples)
    ]
    images, instances = zip(*made) if made else ((), ())
    labels = np.zeros((examples, size, size), np.uint8)
    for into, found in zip(labels, instances):
        for mask, label in zip(found.masks, found.labels):
            into[mask] = label
    return Scenes(
        np.asarray(images, np.uint8).reshape(examples, size, size, 3), labels, instances
    )


def _scene(
    random: np.random.Generator, ink: np.ndarray, labels: np.ndarray, size: int
) -> tuple[np.ndarray, Instances]:
    """Draws one: the image ``[H, W, 3]`` and its digits, out of `ink` ``[M, 8, 8]``."""
    colours = random.uniform(size=3) + VARIATION * random.uniform(
        -1, 1, size=(CORNERS, CORNERS, 3)
    )
    image = _enlarged(np.clip(colours, 0, 1), size)
    masks = np.zeros((0, size, size), bool)
    whole, chosen = np.zeros(0, int), []  # of each digit its pixels, and which it is
    for _ in range(random.integers(COUNT[0], COUNT[1] + 1)):
        digit = int(random.integers(len(ink)))
        side = int(random.integers(SIZE[0] * size // 64, SIZE[1] * size // 64 + 1))
        stroke = _enlarged(ink[digit, ..., None], side)
        for _ in range(TRIES):
            y, x = random.integers(size - side + 1, size=2)
            alpha = np.zeros((size, size, 1), np.float32)
            alpha[y : y + side, x : x + side] = stroke
            mask = alpha[..., 0] > INK
            below = masks & ~mask
            if (below.sum((1, 2)) >= VISIBLE * whole).all():
                behind = image[y : y + side, x : x + side].mean((0, 1))
                image += alpha * (_contrasting(random, behind) - image)
                masks = np.concatenate([below, mask[None]])
                whole = np.append(whole, mask.sum())
                chosen.append(digit)
                break
    gain = EXPOSURE * np.exp(GAIN * random.normal())
    image = gain * image + NOISE * random.normal(size=image.shape)
    pixels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    boxes = np.array([_box(mask) for mask in masks], np.float32).reshape(-1, 4)
    return pixels, Instances(boxes, labels[chosen] + 1, masks)


def _enlarged(values: np.ndarray, size: int) -> np.ndarray:
    """Returns channels ``[h, w, C]`` of 0 to 1 as ``[size, size, C]``, smooth."""
    channels = [
        Image.fromarray(np.float32(channel)).resize(
            (size, size), Image.Resampling.BILINEAR
        )
        for channel in np.moveaxis(values, -1, 0)
    ]
    return np.stack([np.asarray(channel) for channel in channels], -1)


def _contrasting(random: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """Returns a random colour that differs from another enough to be seen."""
    while True:
        found = random.uniform(size=3)
        if np.abs(found - colour).max() >= CONTRAST:
            return found


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Returns x1, y1, x2, y2 around what is true."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
