"""The task of naming the class of an image: loss, accuracy, confusion."""

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
from jax import lax
from jax.sharding import Mesh

from kalman_flax import NETWORKS
from kalman_flax._filter.state import check_choice
from kalman_flax.inference.example_weighing import weigh_example
from kalman_flax.layers.linear import RNG
from train.data.batches import (
    Crops,
    Split,
    Standardize,
    augment,
    draw_crops,
    make_batches,
    make_standardize,
)
from train.data.check import check_images
from train.data.encoded import Encoded
from train.data.fingerprint import check_same, fingerprint
from train.data.parts import part_of
from train.data.sets import Dataset, load_dataset
from train.engine.normalizer import make_normalization
from train.engine.score import Totals
from train.engine.step import TrainState, apply_replicas

#: with more classes than this, an image also counts if the right one is among so many
TOP = 5
Images = Split[np.ndarray] | Encoded


def infer(network: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    """Returns the logits ``[N, num_classes]`` of standardised images by the moving
    statistics (option A)."""
    # The Monte Carlo transition asks for a key; nothing here depends on it.
    rngs = {RNG: jax.random.key(0)}
    logits: Any = network.apply(variables, images, use_running_average=True, rngs=rngs)
    return logits


@dataclasses.dataclass(frozen=True)
class Classification:
    """Images and their classes, a `train.engine.task.Task`.

    Attributes:
        config: of the run.
        mesh: its devices.
        dataset: the images of the run.
        network: maps standardised images to logits.
        standardize: maps uint8 images to what the network takes.
    """

    config: Any
    mesh: Mesh
    dataset: Dataset
    network: nn.Module
    standardize: Standardize

    shown: ClassVar[Mapping[str, str]] = {"loss": ".3f", "accuracy": ".1%"}
    headline: ClassVar[str] = "moving_accuracy"

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuses, with a ValueError, a network there is not."""
        check_choice("network", config.network, tuple(NETWORKS))

    @classmethod
    def build(cls, config: Any, mesh: Mesh, data_dir: str | None) -> Self:
        """Loads the images, and makes the network and what it needs before it.

        Raises:
            ValueError: a setting that cannot be; the message names it.
            FileNotFoundError: the data set is not there.
        """
        dataset = load_dataset(
            config.dataset, data_dir, config.image_size, config.max_pixels
        )
        dataset = part_of(dataset, config)
        train = dataset.train
        images = train.images if isinstance(train, Split) else None
        standardize = make_standardize(config.standardize, images)
        network = make_network(config, dataset.num_classes)
        return cls(config, mesh, dataset, network, standardize)

    @property
    def train(self) -> Images:
        """The training images of the run."""
        return self.dataset.train

    @property
    def test(self) -> Images:
        """Its test images."""
        return self.dataset.test

    @property
    def validation(self) -> Split[np.ndarray] | None:
        """Training images that are kept back, to choose settings by."""
        return self.dataset.validation

    @property
    def test_name(self) -> str:
        """What the data set calls them."""
        return self.dataset.test_name

    def check_data(
        self, kept: Mapping[str, Any] | None, files: bool = False
    ) -> dict[str, Any]:
        """Returns what to know the images by, and which files were found good.

        Raises:
            ValueError: they are not those of `kept`, or files cannot be decoded.
        """
        found = fingerprint(self.config.dataset, self.dataset, self.standardize)
        checked = {}
        if kept is not None:
            check_same(kept.get("images", {}), found)
            checked = kept.get("files", {})
        if files:
            checked = check_images(self.dataset, checked)
        return {"images": found, "files": checked}

    def inputs(self) -> jax.Array:
        """Returns one image of zeros, ``[1, H, W, C]``."""
        return jnp.zeros((1, *self.train.image_shape))

    def order(self) -> Callable[[int], np.ndarray]:
        """Returns a map from the step to the images of its batch, ``[batch_size]``.

        Raises:
            ValueError: they are to be sorted by labels, which are not in memory.
        """
        config, train = self.config, self.train
        labels = None
        if config.sort_batches:
            if not isinstance(train, Split):
                raise ValueError(
                    "sort_batches needs all labels in memory; those of"
                    f" {config.dataset} are not."
                )
            labels = train.labels
        return make_batches(train.examples, config.batch_size, config.seed, labels)

    def draw(self, key: jax.Array) -> Crops:
        """Draws the crops of a batch."""
        config = self.config
        return draw_crops(key, config.batch_size, config.crop_padding, config.flip)

    def replicas(
        self,
        network: nn.Module,
        variables: dict[str, Any],
        images: jax.Array,
        draws: Crops,
        keys: jax.Array,
        mutable: Sequence[str] = ("batch_stats",),
    ) -> tuple[jax.Array, Any]:
        """Runs the micro-batches of a part of a training batch, augmented.

        Returns:
            logits ``[N, num_classes]``, and what the micro-batches wrote.
        """
        images = augment(images, draws, self.config.crop_padding)
        images = self.standardize(images)
        return apply_replicas(network, variables, images, keys, mutable)

    def loss(
        self,
        network: nn.Module,
        variables: dict[str, Any],
        batch: Split[jax.Array],
        draws: Crops,
        keys: jax.Array,
        mutable: Sequence[str] = ("batch_stats",),
    ) -> tuple[dict[str, jax.Array], Any]:
        """Returns the sums of cross-entropy and of right answers, and what was
        written."""
        logits, written = self.replicas(
            network, variables, batch.images, draws, keys, mutable
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        correct = jnp.argmax(logits, -1) == batch.labels
        return {"loss": jnp.sum(loss), "accuracy": jnp.sum(correct)}, written

    def evaluate(
        self, state: TrainState, source: Images, example_weight: float | None = None
    ) -> dict[str, float]:
        """Returns loss and accuracy under both options of the paper.

        ``moving_*`` normalises by the moving statistics (option A), ``batch_*`` by
        those of each micro-batch of `source` (option B). Where there are more than
        `TOP` classes, ``*_top5_accuracy`` is there too. With an `example_weight`, see
        `weigh_example`, there is ``weighed_*`` alone: option A with every image weighed
        into its statistics.
        """
        if example_weight is None:
            totals = self._scores(state, source)
        else:
            totals = self._weighed_scores(state, source, example_weight)
        return {name: float(value) / source.examples for name, value in totals.items()}

    def confusion(self, state: TrainState, source: Images) -> np.ndarray:
        """Returns of each class (row) how many images the network takes for each
        (column), by moving statistics, ``[classes, classes]`` int."""
        return np.rint(self._confusion(state, source)).astype(int)

    @functools.cached_property
    def _scores(self) -> Totals:
        def sums(
            state: TrainState,
            batch: Split[jax.Array],
            counts: jax.Array,
            keys: jax.Array,
        ) -> dict[str, jax.Array]:
            images = self.standardize(batch.images)
            moving = infer(self.network, state.variables, images)
            own, _ = apply_replicas(self.network, state.variables, images, keys)
            return score("moving", moving, batch, counts) | score(
                "batch", own, batch, counts
            )

        return Totals(sums, self.config, self.mesh)

    @functools.cached_property
    def _weighed_scores(self) -> Totals:
        def sums(
            state: TrainState,
            batch: Split[jax.Array],
            counts: jax.Array,
            keys: jax.Array,
            weight: jax.Array,
        ) -> dict[str, jax.Array]:
            with weigh_example(weight):
                images = self.standardize(batch.images)
                logits = infer(self.network, state.variables, images)
            return score("weighed", logits, batch, counts)

        return Totals(sums, self.config, self.mesh)

    @functools.cached_property
    def _confusion(self) -> Totals:
        def sums(
            state: TrainState,
            batch: Split[jax.Array],
            counts: jax.Array,
            keys: jax.Array,
        ) -> jax.Array:
            images = self.standardize(batch.images)
            logits = infer(self.network, state.variables, images)
            classes = logits.shape[-1]
            true = jax.nn.one_hot(batch.labels, classes) * counts[:, None]
            return true.T @ jax.nn.one_hot(jnp.argmax(logits, -1), classes)

        return Totals(sums, self.config, self.mesh)


def score(
    name: str, logits: jax.Array, batch: Split[jax.Array], counts: jax.Array
) -> dict[str, jax.Array]:
    """Returns the sums of loss and accuracies over the images that count, as
    ``NAME_loss`` and so on."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    correct = jnp.argmax(logits, -1) == batch.labels
    result = {
        f"{name}_loss": jnp.sum(loss, where=counts),
        f"{name}_accuracy": jnp.sum(correct, where=counts),
    }
    if logits.shape[-1] > TOP:
        _, best = lax.top_k(logits, TOP)
        among = jnp.any(best == batch.labels[:, None], -1)
        result[f"{name}_top{TOP}_accuracy"] = jnp.sum(among, where=counts)
    return result


def make_network(
    config: Any,
    num_classes: int,
    known: Mapping[str, Callable[..., nn.Module]] = NETWORKS,
) -> nn.Module:
    """Builds the network of `known` that `config` names, with the normaliser that it
    names."""
    network, size = known[config.network], {}
    if config.width:
        if not hasattr(getattr(network, "func", network), "width"):
            raise ValueError(
                f"width is {config.width}, but {config.network!r} has one width; leave"
                " it at 0."
            )
        size["width"] = config.width
    if config.network in ("cifar_resnet", "cifar_resnet_v1", "nf_resnet"):
        size["blocks_per_stage"] = config.blocks_per_stage
    if config.network in ("cifar_resnet", "cifar_resnet_v1"):
        size["scan"] = config.scan_blocks
    return network(
        num_classes=num_classes,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        **size,
        **make_normalization(config)._asdict(),
    )
