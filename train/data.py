"""Data sets small enough to live on the device, as uint8; augmented inside jit."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Split(NamedTuple):
    """Images ``[N, H, W, C]`` uint8 and labels ``[N]`` int32."""

    images: np.ndarray
    labels: np.ndarray

    def take(self, examples: int) -> Split:
        """Returns the first so many examples; all of them for 0."""
        return Split(*(a[: examples or None] for a in self))


class Dataset(NamedTuple):
    """A training and a test split."""

    train: Split
    test: Split
    num_classes: int


def load_dataset(name: str, data_dir: str | None = None) -> Dataset:
    """Loads a data set by name.

    Args:
        name: ``"digits"`` or ``"cifar10"``.
        data_dir: TFDS directory; by default the environment's TFDS_DATA_DIR.

    Raises:
        ValueError: unknown name.
        FileNotFoundError: the data is not there; the message says how to prepare it.
    """
    if name == "digits":
        return _digits()
    if name == "cifar10":
        data_dir = (
            data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        )
        return _cifar10(os.path.expanduser(data_dir))
    raise ValueError(f"unknown data set {name!r}; known are digits, cifar10.")


@functools.cache
def _digits() -> Dataset:
    """UCI digits from scikit-learn, 8 x 8: the first 1,500 to train, 297 to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images[..., None].astype(np.uint8)
    labels = digits.target.astype(np.int32)
    train, test = slice(1500), slice(1500, None)
    return Dataset(
        Split(images[train], labels[train]), Split(images[test], labels[test]), 10
    )


@functools.cache
def _cifar10(data_dir: str) -> Dataset:
    """CIFAR-10 through TFDS' random-access reader, which needs no TensorFlow."""
    import tensorflow_datasets as tfds

    folder = pathlib.Path(data_dir) / "cifar10"
    # Asked for data that is not there, TFDS would start to download it.
    if not list(folder.glob("*/dataset_info.json")):
        raise FileNotFoundError(
            f"no CIFAR-10 in {folder}. Prepare it once, in an environment that has"
            " tensorflow and tensorflow-datasets, with\n"
            "    tfds build cifar10 --file_format=array_record --data_dir=DIR\n"
            "(170 MB to download) and pass --data_dir=DIR or set TFDS_DATA_DIR=DIR."
        )

    def read(split: str) -> Split:
        source = tfds.data_source("cifar10", split=split, data_dir=data_dir)
        examples = [source[i] for i in range(len(source))]
        return Split(
            np.stack([e["image"] for e in examples]),
            np.array([e["label"] for e in examples], np.int32),
        )

    return Dataset(read("train"), read("test"), 10)


@functools.lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Returns the order in which an epoch visits the training examples, ``[N]``."""
    return np.random.default_rng((seed, epoch)).permutation(examples).astype(np.int32)


def make_batches(
    labels: np.ndarray, batch_size: int, seed: int, sort: bool = False
) -> Callable[[int], np.ndarray]:
    """Returns a map from the step to the examples of its batch, ``[batch_size]``.

    Args:
        labels: ``[N]``.
        batch_size: examples a batch; what is left of an epoch is dropped.
        seed: of the order.
        sort: sort every batch by class, so that a micro-batch of it is of one class.
    """
    steps_per_epoch = len(labels) // batch_size

    def batch(step: int) -> np.ndarray:
        epoch, position = divmod(step, steps_per_epoch)
        start = position * batch_size
        index = epoch_order(seed, epoch, len(labels))[start : start + batch_size]
        return index[np.argsort(labels[index], kind="stable")] if sort else index

    return batch


def make_standardize(kind: str, images: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """Returns a map from uint8 to float32 images, fitted to the training `images`.

    Args:
        kind: ``"channel"``: mean 0 and standard deviation 1 per channel; ``"pixel"``:
            minus the mean image, over 128, as the released experiments do.
        images: ``[N, H, W, C]`` uint8.
    """
    if kind == "channel":
        mean = images.mean(axis=(0, 1, 2), dtype=np.float64)
        scale = images.std(axis=(0, 1, 2), dtype=np.float64)
    elif kind == "pixel":
        mean, scale = images.mean(axis=0, dtype=np.float64), 128.0
    else:
        raise ValueError(f"standardize is {kind!r}; expected channel or pixel.")
    mean, scale = np.float32(mean), np.float32(scale)
    return lambda x: (x.astype(jnp.float32) - mean) / scale


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
