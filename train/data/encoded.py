"""Splits that stay on disk, their images decoded on the host when they are read."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from train.data.batches import Split, first
from train.data.pixels import MAX_PIXELS, open_image, orientation, to_rgb

#: left, top, right and bottom, in pixels
Box = tuple[float, float, float, float]

#: of the shorter side that a test image keeps: the usual 224 of 256 pixels
CENTRE = 224 / 256


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A split whose images are files, of any size, read and decoded one by one.

    Attributes:
        source: for each example its encoded image, its label, and what to call it.
        image_size: height and width that images are cropped and resized to.
        examples: how many of the source to use, the first.
        max_pixels: larger images are refused before they are decoded.
    """

    source: Sequence[tuple[bytes, int, str]]
    image_size: int
    examples: int
    max_pixels: int = MAX_PIXELS

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of each image, ``[H, W, C]``."""
        return (self.image_size, self.image_size, 3)

    def take(self, examples: int) -> Encoded:
        """Returns the first so many examples; all of them for 0.

        Raises:
            ValueError: there are fewer.
        """
        return dataclasses.replace(self, examples=first(examples, self.examples))

    def read(
        self, index: np.ndarray, key: Sequence[int] | None = None
    ) -> Split[np.ndarray]:
        """Returns the examples `index`.

        Args:
            index: ``[N]``.
            key: of random crops, drawn from it and the number of the example alone: the
                same wherever and whenever they are read. Without it the centre.

        Raises:
            ValueError: an image that cannot be decoded; the message names it.
        """
        images = np.empty((len(index), *self.image_shape), np.uint8)
        labels = np.empty(len(index), np.int32)
        for row, example in enumerate(index.tolist()):
            data, labels[row], name = self.source[example]
            box = centre_box
            if key is not None:
                box = random_box(np.random.default_rng((*key, example)))
            try:
                images[row] = decode(data, box, self.image_size, self.max_pixels)
            except Exception as error:  # Pillow has many, by format
                raise ValueError(f"image {name} cannot be decoded: {error}") from error
        return Split(images, labels)


def centre_box(width: int, height: int) -> Box:
    """The centre of an image: of 256 pixels along the shorter side, 224."""
    side = CENTRE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(random: np.random.Generator) -> Callable[[int, int], Box]:
    """Boxes of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3, anywhere.

    As of Szegedy et al., "Going deeper with convolutions", 2015, section 6, in the form
    of torchvision's `RandomResizedCrop`: ten attempts, then a box in the centre.
    """

    def box(width: int, height: int) -> Box:
        for _ in range(10):
            area = width * height * random.uniform(0.08, 1.0)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left = int(random.integers(width - w + 1))
                top = int(random.integers(height - h + 1))
                return left, top, left + w, top + h
        w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
        left, top = (width - w) / 2, (height - h) / 2
        return left, top, left + w, top + h

    return box


def decode(
    data: bytes,
    box: Callable[[int, int], Box],
    size: int,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decodes an image, cuts out a box of it and resizes that, antialiased.

    Args:
        data: of a format of `train.data.pixels.FORMATS`.
        box: from width and height, of the image as it is to be seen, to what to cut
            out.
        size: height and width of the result.
        max_pixels: see `open_image`.

    Returns:
        ``[size, size, 3]`` uint8.

    Raises:
        ValueError: see `open_image` and `to_rgb`.
        Exception: what Pillow has for damaged files, of many types.
    """
    with open_image(io.BytesIO(data), max_pixels) as image:
        turn = slice(None, None, -1 if orientation(image) >= 5 else 1)
        full = image.width
        width, height = image.size[turn]
        left, top, right, bottom = box(width, height)
        # A large JPEG is decoded at 1/2, 1/4 or 1/8 where the box keeps enough pixels.
        enough = width * size / (right - left), height * size / (bottom - top)
        least_width, least_height = map(math.ceil, enough[turn])
        image.draft(None, (least_width, least_height))
        shrunk = round(full / image.width)
        image = to_rgb(image).resize(
            (size, size),
            Image.Resampling.BILINEAR,
            box=(left / shrunk, top / shrunk, right / shrunk, bottom / shrunk),
        )
        return np.asarray(image)
