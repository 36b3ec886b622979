"""Images with objects on them: what a detector learns from, and what scores it.

An image lies in the upper left corner of a canvas, whose other pixels are 0. A canvas
is landscape or portrait, and a batch has canvases of one kind.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image

from train.data.batches import Array, epoch_order
from train.data.pixels import open_image, to_rgb


class Canvases(NamedTuple, Generic[Array]):
    """Images on canvases of one size.

    Attributes:
        image: ``[N, H, W, 3]`` uint8.
        size: height and width of the part that is image, ``[N, 2]`` int32.
    """

    image: Array
    size: Array

    @staticmethod
    def black(shapes: np.ndarray) -> Canvases[np.ndarray]:
        """Returns canvases without images.

        Args:
            shapes: height and width of each, all the same, ``[N, 2]``.
        """
        [shape] = np.unique(shapes, axis=0).tolist()
        count = len(shapes)
        return Canvases(
            np.zeros((count, *shape, 3), np.uint8), np.zeros((count, 2), np.int32)
        )

    def draw(
        self: Canvases[np.ndarray],
        place: int,
        path: pathlib.Path,
        shape: tuple[int, int],
        scale: Scale,
        max_pixels: int,
    ) -> None:
        """Draws the image of a file, resized, on one of the canvases, which is black.

        Args:
            place: which canvas.
            path: of the file.
            shape: height and width that the image is to have, upright.
            scale: to bring it to.
            max_pixels: see `train.data.pixels.open_image`.

        Raises:
            ValueError: the image has another shape, or cannot be decoded; the message
                names the file.
        """
        try:
            with open_image(path, max_pixels) as image:
                image = to_rgb(image)
                if image.size[::-1] != shape:
                    raise ValueError(
                        f"it is {image.width} x {image.height}, but is to be"
                        f" {shape[1]} x {shape[0]}."
                    )
                height, width = scale.size(*shape)
                resized = image.resize((width, height), Image.Resampling.BILINEAR)
        except Exception as error:  # Pillow has many, by format
            raise ValueError(f"image {path} cannot be used: {error}") from error
        self.image[place, :height, :width] = resized
        self.size[place] = height, width


class Objects(NamedTuple, Generic[Array]):
    """Canvases, and G slots for the objects on each.

    Attributes:
        image, size: see `Canvases`.
        boxes: ``[N, G, 4]`` float32: x1, y1, x2, y2 in pixels of the canvas, of which
            the first spans 0 to 1.
        labels: ``[N, G]`` int32, from 1; 0 for a slot that is empty.
        crowd: ``[N, G]`` bool: the box is around many objects, none of which has a box.
        masks: ``[N, G, M, M]`` uint8: the share, of 255, of each cell of the box that
            the object covers. Of crowds 0.
    """

    image: Array
    size: Array
    boxes: Array
    labels: Array
    crowd: Array
    masks: Array

    @staticmethod
    def on(
        canvases: Canvases[np.ndarray], slots: int, mask_size: int
    ) -> Objects[np.ndarray]:
        """Returns canvases with so many slots, which are empty."""
        examples = len(canvases.image)
        return Objects(
            *canvases,
            np.zeros((examples, slots, 4), np.float32),
            np.zeros((examples, slots), np.int32),
            np.zeros((examples, slots), bool),
            np.zeros((examples, slots, mask_size, mask_size), np.uint8),
        )

    @property
    def canvases(self) -> Canvases[Array]:
        """The images without the objects."""
        return Canvases(self.image, self.size)


class Pictures(NamedTuple):
    """Of all examples of a split, what is known before an image is read.

    Attributes:
        ids: as the truth has them, ``[N]`` int64.
        original: height and width of the image as it came, ``[N, 2]`` int32.
        size: height and width on the canvas, ``[N, 2]`` int32.
        canvas: height and width of that, ``[N, 2]`` int32; two kinds at most.
    """

    ids: np.ndarray
    original: np.ndarray
    size: np.ndarray
    canvas: np.ndarray


class PictureSource(Protocol):
    """Images to look for objects on."""

    @property
    def examples(self) -> int:
        """Number of images, N."""
        ...

    @property
    def pictures(self) -> Pictures:
        """What is known of all images."""
        ...

    def read_canvases(self, index: np.ndarray) -> Canvases[np.ndarray]:
        """Returns the images `index`, whose canvases are of one size."""
        ...


class ObjectSource(PictureSource, Protocol):
    """A split of images with objects, a `train.engine.task.Source`."""

    @property
    def truth(self) -> dict[str, Any]:
        """Images, annotations and categories in COCO's form, of images as they came."""
        ...

    def read(
        self, index: np.ndarray, key: Sequence[int] | None = None
    ) -> Objects[np.ndarray]:
        """Returns the examples `index`, whose canvases are of one size. Nothing of them
        is random."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns what to know the split by, see `train.data.fingerprint`."""
        ...


Kind = TypeVar("Kind")


class Categories(NamedTuple):
    """The classes of a data set; a label is a place in these tuples, plus 1.

    Attributes:
        ids: as the data set numbers them, with gaps.
        names: of the classes.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def in_coco(self) -> list[dict[str, Any]]:
        """Returns them in COCO's form."""
        return [{"id": i, "name": name} for i, name in zip(self.ids, self.names)]


class ObjectData(NamedTuple, Generic[Kind]):
    """A training and a test split, and their classes.

    Attributes:
        train, test: each an `ObjectSource`.
        test_name: what the data set itself calls its test split.
    """

    train: Kind
    test: Kind
    categories: Categories
    test_name: str = "test"


class Scale(NamedTuple):
    """How large images are to be on their canvases.

    Attributes:
        short: their shorter side, in pixels.
        long: their longer side, at most; where it would be more, the shorter is less.
        multiple: of which the sides of a canvas are.
    """

    short: int
    long: int
    multiple: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width of an image on its canvas."""
        factor = min(self.short / min(height, width), self.long / max(height, width))
        return max(1, round(height * factor)), max(1, round(width * factor))

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """Returns height and width of the canvas of an image of this shape."""
        short, long = (-(-side // self.multiple) * self.multiple for side in self[:2])
        return (short, long) if width >= height else (long, short)


def pictures_of(
    ids: Iterable[int], shapes: Sequence[tuple[int, int]], scale: Scale
) -> Pictures:
    """Returns what is known of images of these ids, heights and widths."""

    def pairs(found: Sequence[tuple[int, int]]) -> np.ndarray:
        return np.array(found, np.int32).reshape(-1, 2)

    return Pictures(
        np.array(list(ids), np.int64),
        pairs(shapes),
        pairs([scale.size(*shape) for shape in shapes]),
        pairs([scale.canvas(*shape) for shape in shapes]),
    )


def make_bucket_batches(
    portrait: np.ndarray, batch_size: int, seed: int
) -> Callable[[int], np.ndarray]:
    """Returns a map from the step to the examples of its batch, ``[batch_size]``.

    A batch is of one kind of canvas. Of each kind the batches come evenly spread, as
    often as its share of the examples asks for. A kind is a stream of epochs without
    gaps: what is left of one begins the next batch. So no example is dropped, and none
    comes a second time before all of its kind have come once.

    Args:
        portrait: which examples lie on the second kind of canvas, ``[N]`` bool.
        batch_size: examples a batch.
        seed: of the order.
    """
    kinds = np.flatnonzero(~portrait), np.flatnonzero(portrait)
    second, examples = len(kinds[1]), len(portrait)

    def batch(step: int) -> np.ndarray:
        before = step * second // examples  # batches of the second kind
        kind = (step + 1) * second // examples - before
        members = kinds[kind]
        number = before if kind else step - before
        places = number * batch_size + np.arange(batch_size)
        index = [
            epoch_order(seed, epoch, len(members))[place]
            for epoch, place in zip(*(x.tolist() for x in divmod(places, len(members))))
        ]
        return members[index]

    return batch


def crop_mask(mask: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Returns the part of a mask in a box, resampled to ``[size, size]`` uint8.

    Args:
        mask: ``[H, W]``, 0 or 1.
        box: x1, y1, x2, y2 within it, in pixels; not empty.
        size: side of the result, whose values are from 0 to 255.
    """
    x1, y1, x2, y2 = map(float, box)
    left, top = int(x1), int(y1)
    part = mask[top : int(np.ceil(y2)), left : int(np.ceil(x2))]
    image = Image.fromarray(255 * part.astype(np.uint8)).resize(
        (size, size),
        Image.Resampling.BILINEAR,
        box=(x1 - left, y1 - top, x2 - left, y2 - top),
    )
    return np.asarray(image)
