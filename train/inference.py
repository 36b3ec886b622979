"""Other statistics that a trained network can infer by, found on training images."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from kalman_flax.baselines.precise import precise_statistics
from train.data import augment, epoch_order, make_standardize
from train.experiment import Experiment
from train.step import TrainState, apply_replicas

AUTO = "auto"
#: what `choose_weight` chooses from
WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


def parse_weight(text: str | None) -> float | str | None:
    """Returns the example weight that a user asked for: a number, `AUTO`, or None.

    Raises:
        ValueError: it is anything else.
    """
    if text in (None, AUTO):
        return text
    try:
        weight = float(text)
    except ValueError:
        weight = np.nan
    if not 0.0 <= weight <= 1.0:
        raise ValueError(
            f"example_weight is {text!r}; expected a number from 0 to 1, or {AUTO}."
        )
    return weight


def choose_weight(experiment: Experiment, state: TrainState) -> float:
    """Returns which of `WEIGHTS` has the smallest loss on training images, as they are,
    of which it takes as many as there are test images."""
    split = experiment.train.take(len(experiment.test.labels))

    def loss(weight: float) -> float:
        return experiment.evaluate(state, split, weight)["weighed_loss"]

    return min(WEIGHTS, key=loss)


def recompute(
    config: Any, experiment: Experiment, state: TrainState, batches: int
) -> TrainState:
    """Returns `state` with the precise statistics of the first `batches` training
    batches, split into micro-batches and augmented as in training."""
    images = experiment.train.images
    standardize = make_standardize(config.standardize, np.asarray(images))

    @jax.jit
    def write(
        state: TrainState, images: jax.Array, step: jax.Array, index: jax.Array
    ) -> Any:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        augment_key, replica_key = jax.random.split(key)
        batch = augment(augment_key, images[index], config.crop_padding, config.flip)
        _, written = apply_replicas(
            experiment.network,
            state.variables,
            standardize(batch),
            config.micro_batch_size,
            replica_key,
        )
        return written["batch_stats"]

    forward = functools.partial(write, state, images)
    stats = precise_statistics(
        lambda batch: forward(*batch),
        state.batch_stats,
        _training_batches(config, experiment, batches),
        momentum=config.stats_momentum,
    )
    return state.replace(batch_stats=stats)


def _training_batches(
    config: Any, experiment: Experiment, batches: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (step, examples) as training visits them, from its first step on."""
    labels = np.asarray(experiment.train.labels)
    for step in range(batches):
        epoch, position = divmod(step, experiment.steps_per_epoch)
        start = position * config.batch_size
        order = epoch_order(config.seed, epoch, len(labels))
        index = order[start : start + config.batch_size]
        if config.get("sort_batches", False):  # not in the configs of older runs
            index = index[np.argsort(labels[index], kind="stable")]
        yield step, index
