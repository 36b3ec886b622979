"""From a config to everything that a run needs: data, network, optimiser, state."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from kalman_flax import NORMALIZERS, Normalization, ResNet, normalization
from kalman_flax.state import check_choice
from train.controls import CONTROLS
from train.data import Dataset, Split, load_dataset, make_batches, make_standardize
from train.step import (
    Metrics,
    TrainState,
    create_state,
    make_evaluate,
    make_train_step,
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run, with `train` and `test` on the device."""

    train: Split
    test: Split
    network: nn.Module
    standardize: Callable[[jax.Array], jax.Array]
    state: TrainState
    train_step: Callable[[TrainState, Split, Any], tuple[TrainState, Metrics]]
    evaluate: Callable[..., dict[str, float]]
    batch: Callable[[int], np.ndarray]
    schedule: optax.Schedule
    steps_per_epoch: int
    total_steps: int


def build(config: Any, data_dir: str | None = None) -> Experiment:
    """Builds the experiment that `config` describes.

    Args:
        config: as in `configs/base.py`.
        data_dir: TFDS directory, see `load_dataset`.

    Raises:
        ValueError: a setting that cannot be; the message names it.
        FileNotFoundError: the data set is not there.
    """
    check(config)
    dataset = load_dataset(config.dataset, data_dir)
    train = dataset.train.take(config.train_examples)
    steps_per_epoch = len(train.labels) // config.batch_size
    if not steps_per_epoch:
        raise ValueError(
            f"batch_size {config.batch_size} is larger than the {len(train.labels)}"
            " training examples."
        )
    total_steps = config.epochs * steps_per_epoch
    schedule = make_schedule(config, steps_per_epoch)
    optimizer = make_optimizer(config, schedule)
    standardize = make_standardize(config.standardize, train.images)
    network = make_network(config, dataset)
    return Experiment(
        train=jax.device_put(train),
        test=jax.device_put(dataset.test),
        network=network,
        standardize=standardize,
        state=create_state(
            network, optimizer, jax.random.key(config.seed), train.images.shape[1:]
        ),
        train_step=make_train_step(network, optimizer, standardize, config),
        evaluate=make_evaluate(network, standardize, config),
        batch=make_batches(
            train.labels, config.batch_size, config.seed, config.sort_batches
        ),
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )


def check(config: Any) -> None:
    """Raises a ValueError for batch sizes or a normaliser that cannot be."""
    if config.micro_batch_size < 1 or config.batch_size % config.micro_batch_size:
        raise ValueError(
            f"micro_batch_size {config.micro_batch_size} does not divide batch_size"
            f" {config.batch_size}."
        )
    make_normalization(config)


def make_normalization(config: Any) -> Normalization:
    """Looks up the normaliser that `config` names, and sets its options."""
    try:
        options = json.loads(config.norm_options)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"norm_options is {config.norm_options!r}, which is not JSON ({error});"
            ' expected an object such as {"gain": 0.5, "learn_gain": null}.'
        ) from error
    if not isinstance(options, dict):
        raise ValueError(f"norm_options is {config.norm_options}; expected an object.")
    return normalization(
        config.norm,
        momentum=config.stats_momentum,
        known=NORMALIZERS | CONTROLS,
        **options,
    )


def make_network(config: Any, dataset: Dataset) -> nn.Module:
    """Builds the network, with the normaliser that `config` names."""
    check_choice("dtype", config.dtype, ("float32", "bfloat16"))
    return ResNet(
        num_classes=dataset.num_classes,
        blocks_per_stage=config.blocks_per_stage,
        width=config.width,
        scan=config.scan_blocks,
        dtype=jnp.dtype(config.dtype),
        **make_normalization(config)._asdict(),
    )


def make_schedule(config: Any, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then cosine or steps."""
    check_choice("schedule", config.schedule, ("cosine", "step"))
    warmup = config.warmup_epochs * steps_per_epoch
    steps = config.epochs * steps_per_epoch - warmup
    if steps < 1:
        raise ValueError(
            f"warmup_epochs {config.warmup_epochs} leaves none of epochs"
            f" {config.epochs}."
        )
    rate = config.learning_rate
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(rate, steps)
    else:
        if len(config.step_epochs) != len(config.step_factors):
            raise ValueError(
                f"step_epochs {config.step_epochs} and step_factors"
                f" {config.step_factors} differ in length."
            )
        drops = {
            epoch * steps_per_epoch - warmup: factor
            for epoch, factor in zip(config.step_epochs, config.step_factors)
        }
        schedule = optax.piecewise_constant_schedule(rate, drops)
    if not warmup:
        return schedule
    rise = optax.linear_schedule(rate / warmup, rate, max(1, warmup - 1))
    return optax.join_schedules([rise, schedule], [warmup])


def make_optimizer(
    config: Any, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """SGD with momentum; weight decay, as an L2 penalty, on the kernels only."""

    def kernels(params: Any) -> Any:
        return traverse_util.path_aware_map(
            lambda path, _: path[-1] == "kernel", params
        )

    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=kernels),
        optax.sgd(schedule, momentum=config.sgd_momentum),
    )
