"""Batches of uint8 images: their order, how they are standardised and augmented."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kalman_flax._filter.state import check_choice

#: on the host, or of a batch on the devices
Array = TypeVar("Array", np.ndarray, jax.Array)

#: see `make_standardize`
STANDARDIZE = ("channel", "pixel")

#: of the red, green and blue pixels of ImageNet's training images, from 0 to 1
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406])
IMAGENET_STD = np.array([0.229, 0.224, 0.225])


def first(asked: int, examples: int) -> int:
    """Returns how many examples a split of so many has left when `asked` are taken; all
    of them for 0.

    Raises:
        ValueError: there are fewer.
    """
    if not 0 <= asked <= examples:
        raise ValueError(
            f"asked for the first {asked:,} of {examples:,} images; expected"
            " train_examples and test_examples of at most what there is, or 0 for all."
        )
    return asked or examples


class Split(NamedTuple, Generic[Array]):
    """Images and their labels in memory, a `train.engine.task.Source`.

    Attributes:
        images: ``[N, H, W, C]`` uint8.
        labels: the class of each image, ``[N]`` int32; or of each pixel, ``[N, H, W]``
            uint8, see `train.data.segments`.
    """

    images: Array
    labels: Array

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of each image, ``[H, W, C]``."""
        return self.images.shape[1:]

    def take(self, examples: int) -> Split[Array]:
        """Returns the first so many examples; all of them for 0.

        Raises:
            ValueError: there are fewer.
        """
        return Split(*(a[: first(examples, self.examples)] for a in self))

    def read(self, index: np.ndarray, key: Sequence[int] | None = None) -> Split[Array]:
        """Returns the examples `index`, as they are."""
        return Split(*(a[index] for a in self))


# Two of each run that trains at once, as those who read ahead go back and forth across
# the end of an epoch.
@functools.lru_cache(maxsize=16)
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Returns the order in which an epoch visits the training examples, ``[N]``."""
    return np.random.default_rng((seed, epoch)).permutation(examples).astype(np.int32)


def make_batches(
    examples: int, batch_size: int, seed: int, sort_by: np.ndarray | None = None
) -> Callable[[int], np.ndarray]:
    """Returns a map from the step to the examples of its batch, ``[batch_size]``.

    Args:
        examples: their number, N.
        batch_size: examples a batch; what is left of an epoch is dropped.
        seed: of the order.
        sort_by: labels ``[N]`` to sort every batch by, so that a micro-batch of it is
            of one class.
    """
    steps_per_epoch = examples // batch_size

    def batch(step: int) -> np.ndarray:
        epoch, position = divmod(step, steps_per_epoch)
        start = position * batch_size
        index = epoch_order(seed, epoch, examples)[start : start + batch_size]
        if sort_by is None:
            return index
        return index[np.argsort(sort_by[index], kind="stable")]

    return batch


class Standardize(NamedTuple):
    """A map from uint8 to float32 images: (x - mean) / scale.

    Attributes:
        mean: float32, of what broadcasts to ``[H, W, C]``.
        scale: the same.
    """

    mean: np.ndarray
    scale: np.ndarray

    def __call__(self, images: Array) -> Array:
        """Maps ``[..., H, W, C]``."""
        return (images.astype(jnp.float32) - self.mean) / self.scale


def make_standardize(kind: str, images: np.ndarray | None) -> Standardize:
    """Returns the map fitted to the training `images`.

    Args:
        kind: ``"channel"``: mean 0 and standard deviation 1 per channel; ``"pixel"``:
            minus the mean image, over 128, as the released experiments do.
        images: ``[N, H, W, C]`` uint8; None if they are not in memory, which stands for
            the usual moments of ImageNet.
    """
    check_choice("standardize", kind, STANDARDIZE)
    if images is None:
        if kind == "pixel":
            raise ValueError(
                "standardize is 'pixel', but the images are not in memory, to take"
                " their mean of; expected channel."
            )
        mean, scale = 255 * IMAGENET_MEAN, 255 * IMAGENET_STD
    elif kind == "pixel":
        mean, scale = images.mean(axis=0, dtype=np.float64), 128.0
    else:
        mean = images.mean(axis=(0, 1, 2), dtype=np.float64)
        scale = np.sqrt(_mean_square(images) - mean**2)
    return Standardize(np.asarray(mean, np.float32), np.asarray(scale, np.float32))


def _mean_square(images: np.ndarray, chunk: int = 4096) -> np.ndarray:
    """Mean square of each channel, ``[C]``; `np.std` would hold all images in float64.

    A sum of integers, in which nothing is lost.
    """
    sums = [
        np.square(images[i : i + chunk], dtype=np.uint32).sum(axis=(0, 1, 2))
        for i in range(0, len(images), chunk)
    ]
    return np.sum(sums, axis=0) / math.prod(images.shape[:3])


class Crops(NamedTuple):
    """How to crop and mirror N images.

    Attributes:
        corners: of the crops in the padded images, ``[N, 2]`` int32, from 0 to twice
            the padding; None leaves the images as they are.
        mirrored: ``[N, 1, 1, 1]`` bool; None mirrors none.
    """

    corners: jax.Array | None
    mirrored: jax.Array | None


def draw_crops(key: jax.Array, examples: int, padding: int, flip: bool) -> Crops:
    """Draws crops out of images padded by so many pixels, half of them mirrored."""
    crop_key, flip_key = jax.random.split(key)
    return Crops(
        jax.random.randint(crop_key, (examples, 2), 0, 2 * padding + 1)
        if padding
        else None,
        jax.random.bernoulli(flip_key, shape=(examples, 1, 1, 1)) if flip else None,
    )


def augment(images: jax.Array, crops: Crops, padding: int) -> jax.Array:
    """Crops ``[N, H, W, C]`` after padding with zeros, and mirrors."""
    if crops.corners is not None:
        pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        images = jax.vmap(
            lambda image, corner: lax.dynamic_slice(
                image, (*corner, 0), images.shape[1:]
            )
        )(jnp.pad(images, pads), crops.corners)
    if crops.mirrored is not None:
        images = jnp.where(crops.mirrored, images[:, :, ::-1], images)
    return images
