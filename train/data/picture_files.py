"""Images that are only to be looked at: a file, or all in a folder."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np

from train.data.names import IMAGES, is_hidden, suffix
from train.data.objects import (
    Canvases,
    Pictures,
    PictureSource,
    Scale,
    pictures_of,
)
from train.data.pixels import is_image, open_image, orientation, to_rgb


def find_images(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns a file, or the image files of a folder by name; not those of folders
    within.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no {path}; expected an image, or a folder of images.")
    found = sorted(
        each
        for each in path.iterdir()
        if each.is_file()
        and not is_hidden(each.name)
        and (suffix(each.name) in IMAGES or is_image(each))
    )
    if not found:
        raise FileNotFoundError(f"no images in {path}; expected JPEG, PNG or the like.")
    return found


@dataclasses.dataclass(frozen=True)
class PictureFiles(PictureSource):
    """Image files on canvases.

    Attributes:
        paths: of the files.
        scale: to which images are brought.
        max_pixels: larger images are refused before they are decoded.
    """

    paths: Sequence[pathlib.Path]
    scale: Scale
    max_pixels: int

    @property
    def examples(self) -> int:
        """Number of images."""
        return len(self.paths)

    @functools.cached_property
    def pictures(self) -> Pictures:
        """What is known of all images, numbered from 1.

        Raises:
            ValueError: a file is no image; the message names it.
        """
        shapes = [_shape(path, self.max_pixels) for path in self.paths]
        return pictures_of(range(1, len(shapes) + 1), shapes, self.scale)

    def pixels(self, example: int) -> np.ndarray:
        """Returns an image as it came, upright, ``[H, W, 3]`` uint8."""
        with open_image(self.paths[example], self.max_pixels) as image:
            return np.asarray(to_rgb(image))

    def read_canvases(self, index: np.ndarray) -> Canvases[np.ndarray]:
        """Returns the images `index`, whose canvases are of one size.

        Raises:
            ValueError: an image that cannot be decoded; the message names it.
        """
        canvases = Canvases.black(self.pictures.canvas[index])
        for place, example in enumerate(index.tolist()):
            path, shape = self.paths[example], self.pictures.original[example]
            canvases.draw(
                place, path, tuple(shape.tolist()), self.scale, self.max_pixels
            )
        return canvases


def _shape(path: pathlib.Path, max_pixels: int) -> tuple[int, int]:
    """Height and width of an image, upright."""
    try:
        with open_image(path, max_pixels) as image:
            width, height = image.size
            turned = orientation(image) >= 5
    except ValueError as error:
        raise ValueError(f"image {path} cannot be used: {error}") from error
    return (width, height) if turned else (height, width)
