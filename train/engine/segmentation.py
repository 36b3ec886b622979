"""The task of naming the class of every pixel: loss, mIoU, Dice."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from kalman_flax import SEGMENTERS
from kalman_flax._filter.state import check_choice
from train.data.batches import (
    Crops,
    Split,
    Standardize,
    draw_crops,
    make_batches,
    make_standardize,
)
from train.data.fingerprint import check_same, fingerprint
from train.data.pairs import Pairs, check_pairs
from train.data.segment_sets import DATASETS, SegmentData, load_segments
from train.data.segments import augment_both, one_of_each
from train.engine.classification import infer, make_network
from train.engine.score import Totals
from train.engine.step import TrainState, apply_replicas

Source = Split[np.ndarray] | Pairs


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """Images and a class for each of their pixels, a `train.engine.task.Task`.

    Attributes:
        config: of the run.
        mesh: its devices.
        data: the images of the run.
        network: maps standardised images to logits of every pixel.
        standardize: maps uint8 images to what the network takes.
    """

    config: Any
    mesh: Mesh
    data: SegmentData
    network: nn.Module
    standardize: Standardize

    shown: ClassVar[Mapping[str, str]] = {"loss": ".3f", "accuracy": ".1%"}
    headline: ClassVar[str] = "moving_miou"
    validation = None

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuses, with a ValueError, what is not there, or would change nothing."""
        check_choice("dataset", config.dataset, DATASETS)
        check_choice("network", config.network, tuple(SEGMENTERS))
        if config.sort_batches:
            raise ValueError(
                "sort_batches is True, but an image has pixels of many classes to sort"
                " by; leave it out."
            )

    @classmethod
    def build(cls, config: Any, mesh: Mesh, data_dir: str | None) -> Self:
        """Finds the images, and makes the network.

        Raises:
            ValueError: a setting that cannot be, or files that cannot be meant.
            FileNotFoundError: the data set is not there.
        """
        data = load_segments(
            config.dataset,
            data_dir,
            config.image_size,
            (config.train_examples, config.test_examples),
            config.max_pixels,
        )
        images = data.train.images if isinstance(data.train, Split) else None
        standardize = make_standardize(config.standardize, images)
        network = make_network(config, data.num_classes, SEGMENTERS)
        return cls(config, mesh, data, network, standardize)

    @property
    def train(self) -> Source:
        """The training images of the run."""
        return self.data.train

    @property
    def test(self) -> Source:
        """Its test images."""
        return self.data.test

    @property
    def test_name(self) -> str:
        """What the data set calls them."""
        return self.data.test_name

    def check_data(
        self, kept: Mapping[str, Any] | None, files: bool = False
    ) -> dict[str, Any]:
        """Returns what to know the images by, and which files were found good.

        Raises:
            ValueError: they are not those of `kept`, or cannot be used.
        """
        found = fingerprint(self.config.dataset, self.data, self.standardize)
        checked = {}
        if kept is not None:
            check_same(kept.get("images", {}), found)
            checked = kept.get("files", {})
        if files:
            pairs = [split for split in self.data[:2] if isinstance(split, Pairs)]
            checked = check_pairs(pairs, checked)
        return {"images": found, "files": checked}

    def inputs(self) -> jax.Array:
        """Returns one image of zeros, ``[1, H, W, C]``."""
        return jnp.zeros((1, *self.train.image_shape))

    def order(self) -> Callable[[int], np.ndarray]:
        """Returns a map from the step to the images of its batch, ``[batch_size]``."""
        config = self.config
        return make_batches(self.train.examples, config.batch_size, config.seed)

    def draw(self, key: jax.Array) -> Crops:
        """Draws the crops of a batch."""
        config = self.config
        return draw_crops(key, config.batch_size, config.crop_padding, config.flip)

    def loss(
        self,
        network: nn.Module,
        variables: dict[str, Any],
        batch: Split[jax.Array],
        draws: Crops,
        keys: jax.Array,
        mutable: Sequence[str] = ("batch_stats",),
    ) -> tuple[dict[str, jax.Array], Any]:
        """Returns the sums over the images of cross-entropy and of right answers, each
        the mean over an image's pixels that count, and what was written."""
        batch = augment_both(batch, draws, self.config.crop_padding)
        images = self.standardize(batch.images)
        logits, written = apply_replicas(network, variables, images, keys, mutable)
        labels, counts = one_of_each(batch.labels)
        found = {
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
            "accuracy": jnp.argmax(logits, -1) == labels,
        }
        pixels = jnp.maximum(jnp.sum(counts, (1, 2)), 1)  # in none may one count
        sums = {
            name: jnp.sum(jnp.sum(each, (1, 2), where=counts) / pixels)
            for name, each in found.items()
        }
        return sums, written

    def evaluate(self, state: TrainState, source: Source) -> dict[str, float]:
        """Returns loss, accuracy, mIoU and Dice under both options of the paper.

        ``moving_*`` normalises by the moving statistics (option A), ``batch_*`` by
        those of each micro-batch of `source` (option B). All are of the pixels of all
        images together.
        """
        totals = self._totals(state, source)
        return {
            f"{option}_{name}": value
            for option, found in totals.items()
            for name, value in _numbers(**found).items()
        }

    def confusion(self, state: TrainState, source: Source) -> dict[str, np.ndarray]:
        """Returns of each class (row) how many pixels the network takes for each
        (column), ``[classes, classes]`` int, under ``"moving"`` and ``"batch"``, see
        `evaluate`."""
        totals = self._totals(state, source)
        return {
            option: np.rint(found["confusion"]).astype(int)
            for option, found in totals.items()
        }

    def predict(self, state: TrainState, images: np.ndarray) -> np.ndarray:
        """Returns the classes of the pixels of ``[N, H, W, 3]`` uint8, by the moving
        statistics, ``[N, H, W]`` int."""
        logits = self._infer(jax.device_get(state.variables), images)
        return np.asarray(jnp.argmax(logits, -1))

    @functools.cached_property
    def _infer(self) -> Callable[..., jax.Array]:
        return jax.jit(
            lambda variables, images: infer(
                self.network, variables, self.standardize(images)
            )
        )

    @functools.cached_property
    def _totals(self) -> Totals:
        def sums(
            state: TrainState,
            batch: Split[jax.Array],
            counts: jax.Array,
            keys: jax.Array,
        ) -> dict[str, Any]:
            images = self.standardize(batch.images)
            own, _ = apply_replicas(self.network, state.variables, images, keys)
            options = {
                "moving": infer(self.network, state.variables, images),
                "batch": own,
            }
            labels, known = one_of_each(batch.labels)
            known &= counts[:, None, None]
            return {
                option: _sums(logits, labels, known)
                for option, logits in options.items()
            }

        return Totals(sums, self.config, self.mesh)


def _sums(
    logits: jax.Array, labels: jax.Array, counts: jax.Array
) -> dict[str, jax.Array]:
    """Returns the sum of the losses of the pixels that count, and the confusion matrix
    of those, ``[classes, classes]`` int32: more than float32 counts to."""
    classes = logits.shape[-1]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    cell = labels * classes + jnp.argmax(logits, -1)
    confusion = jnp.zeros(classes**2, jnp.int32)
    confusion = confusion.at[cell].add(counts.astype(jnp.int32))
    return {
        "loss": jnp.sum(loss, where=counts),
        "confusion": confusion.reshape(classes, classes),
    }


def _numbers(loss: np.ndarray, confusion: np.ndarray) -> dict[str, float]:
    """Returns what the sums over a split come to."""
    pixels = max(confusion.sum(), 1)
    iou, dice = iou_and_dice(confusion)
    return {
        "loss": float(loss / pixels),
        "accuracy": float(confusion.trace() / pixels),
        "miou": float(np.nanmean(iou)),
        "dice": float(np.nanmean(dice)),
    }


def iou_and_dice(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns both of each class, ``[classes]``: TP / (TP + FP + FN) and 2 TP / (2 TP +
    FP + FN); NaN of a class that is neither there nor predicted.

    Args:
        confusion: of each class (row) the pixels taken for each (column).
    """
    right = np.diagonal(confusion).astype(float)
    both = confusion.sum(0) + confusion.sum(1)
    with np.errstate(invalid="ignore"):
        return right / (both - right), 2 * right / both
