"""From a config to everything that a run needs: data, network, optimiser, state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh

from kalman_flax import NETWORKS
from train.data.batches import Split, Standardize, make_batches, make_standardize
from train.data.encoded import Encoded
from train.data.sets import Dataset, load_dataset
from train.engine.feed import Feed
from train.engine.mesh import make_mesh, take
from train.engine.score import make_confusion, make_evaluate
from train.engine.settings import check, make_normalization
from train.engine.step import Metrics, TrainState, create_state, jit_update, make_update


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run, with `train` and `test` on the host or on its disk.

    Attributes:
        classes: their names, by label.
        test_name: what the data set calls the test split.
        batch: from the step to its examples, split over the devices of `mesh`.
    """

    mesh: Mesh
    train: Split | Encoded
    test: Split | Encoded
    classes: tuple[str, ...]
    test_name: str
    network: nn.Module
    standardize: Standardize
    state: TrainState
    batch: Callable[[int], Split]
    train_step: Callable[[TrainState, Split], tuple[TrainState, Metrics]]
    evaluate: Callable[..., dict[str, float]]
    confusion: Callable[[TrainState, Split | Encoded], np.ndarray]
    schedule: optax.Schedule
    steps_per_epoch: int
    total_steps: int

    @property
    def splits(self) -> dict[str, Split | Encoded]:
        """What there is to evaluate on, by name: the training images of the run, and
        the test images, under the data set's name for them as well."""
        return {"train": self.train, "test": self.test, self.test_name: self.test}


def build(
    config: Any,
    data_dir: str | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Experiment:
    """Builds the experiment that `config` describes.

    Args:
        config: as in `configs/base.py`.
        data_dir: see `load_dataset`.
        devices: those to train on; by default all, see `make_mesh`.

    Raises:
        ValueError: a setting that cannot be; the message names it.
        FileNotFoundError: the data set is not there.
    """
    mesh = make_mesh(check(config), devices)
    dataset = load_dataset(
        config.dataset, data_dir, config.image_size, config.max_pixels
    )
    train = dataset.train.take(config.train_examples)
    steps_per_epoch = train.examples // config.batch_size
    if not steps_per_epoch:
        raise ValueError(
            f"batch_size {config.batch_size} is larger than the {train.examples}"
            " training examples."
        )
    total_steps = config.epochs * steps_per_epoch
    schedule = make_schedule(config, steps_per_epoch)
    optimizer = make_optimizer(config, schedule)
    images = train.images if isinstance(train, Split) else None
    standardize = make_standardize(config.standardize, images)
    network = make_network(config, dataset)
    return Experiment(
        mesh=mesh,
        train=train,
        test=dataset.test.take(config.test_examples),
        classes=dataset.classes,
        test_name=dataset.test_name,
        network=network,
        standardize=standardize,
        state=create_state(network, optimizer, config.seed, train.image_shape, mesh),
        batch=make_batch(config, mesh, train),
        train_step=jit_update(
            make_update(network, optimizer, standardize, config, mesh)
        ),
        evaluate=make_evaluate(network, standardize, config, mesh),
        confusion=make_confusion(network, standardize, config, mesh),
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )


def make_batch(
    config: Any, mesh: Mesh, train: Split | Encoded
) -> Callable[[int], Split]:
    """Returns a map from the step to its examples, split over the devices of `mesh`."""
    size, seed = config.batch_size, config.seed
    if isinstance(train, Split):
        labels = train.labels if config.sort_batches else None
        index = make_batches(train.examples, size, seed, labels)
        return lambda step: take(mesh, train, index(step))
    if config.sort_batches:
        raise ValueError(
            f"sort_batches needs all labels in memory; those of {config.dataset} are"
            " not."
        )
    index = make_batches(train.examples, size, seed)
    steps_per_epoch = train.examples // size

    def read(step: int, rows: np.ndarray) -> Split:
        return train.read(index(step)[rows], key=(seed, step // steps_per_epoch))

    return Feed(mesh, size, read, config.data_workers)


def make_network(config: Any, dataset: Dataset) -> nn.Module:
    """Builds the network that `config` names, with the normaliser that it names."""
    size = {}
    if config.network == "cifar_resnet":
        size = {
            "blocks_per_stage": config.blocks_per_stage,
            "width": config.width,
            "scan": config.scan_blocks,
        }
    return NETWORKS[config.network](
        num_classes=dataset.num_classes,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        **size,
        **make_normalization(config)._asdict(),
    )


def make_schedule(
    config: Any, steps_per_epoch: int, rate: jax.Array | float | None = None
) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then cosine or steps.

    `rate` takes the place of ``config.learning_rate``.
    """
    warmup = config.warmup_epochs * steps_per_epoch
    steps = config.epochs * steps_per_epoch - warmup
    rate = config.learning_rate if rate is None else rate
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(rate, steps)
    else:
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
    """SGD with momentum; weight decay, as an L2 penalty, on the kernels only, and not a
    part of the gradient that is clipped."""

    def kernels(params: Any) -> Any:
        return traverse_util.path_aware_map(
            lambda path, _: path[-1] == "kernel", params
        )

    # Left out where nothing is clipped: checkpoints hold the state of each link.
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(
        *clip,
        optax.add_decayed_weights(config.weight_decay, mask=kernels),
        optax.sgd(schedule, momentum=config.sgd_momentum),
    )
