"""From a config to everything that a run needs: task, state, compiled step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from train.engine.feed import batches_of
from train.engine.mesh import Devices, make_key, make_mesh, same
from train.engine.optimizer import make_optimizer
from train.engine.schedule import count_steps, make_schedule
from train.engine.settings import check, task_of
from train.engine.step import Metrics, TrainState, create_state, jit_update, make_update
from train.engine.task import Task


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run.

    Attributes:
        mesh: its devices.
        task: its network and data, and what one is to do with the other.
        state: that it starts from.
        key: of its seed, on all devices.
        rates: the learning rate of each update, ``[steps]``, on all devices.
        batch: from the step to its examples, split over the devices.
        update: ``(state, batch, key, rates) -> (state, metrics)``, compiled.
        steps_per_epoch: updates that go once through the training examples.
    """

    mesh: Mesh
    task: Task
    state: TrainState
    key: jax.Array
    rates: jax.Array
    batch: Callable[[int], Any]
    update: Callable[..., tuple[TrainState, Metrics]]
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Updates of the run."""
        return len(self.rates)

    def train_step(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Makes one update, which takes over the state."""
        return self.update(state, batch, self.key, self.rates)


def build(
    config: Any,
    data_dir: str | None = None,
    devices: Devices | None = None,
) -> Experiment:
    """Builds the experiment that `config` describes.

    Args:
        config: as in `configs/base.py`.
        data_dir: where the data is, see `train.data.sets.load_dataset`.
        devices: those to train on; by default all, see `make_mesh`.

    Raises:
        ValueError: a setting that cannot be; the message names it.
        FileNotFoundError: the data set is not there.
    """
    mesh = make_mesh(check(config), devices)
    task = task_of(config).build(config, mesh, data_dir)
    steps_per_epoch = task.train.examples // config.batch_size
    if not steps_per_epoch:
        raise ValueError(
            f"batch_size {config.batch_size} is larger than the"
            f" {task.train.examples} training examples."
        )
    optimizer = functools.partial(make_optimizer, config)
    key = make_key(mesh, config.seed)
    return Experiment(
        mesh=mesh,
        task=task,
        state=create_state(task, optimizer, key, mesh),
        key=key,
        rates=make_rates(config, steps_per_epoch, mesh),
        batch=make_batch(config, mesh, task),
        update=jit_update(make_update(task, optimizer, config, mesh)),
        steps_per_epoch=steps_per_epoch,
    )


def make_rates(config: Any, steps_per_epoch: int, mesh: Mesh) -> jax.Array:
    """Returns the learning rate of each update of a run, ``[steps]`` float32."""
    schedule = make_schedule(config, steps_per_epoch)
    steps = jnp.arange(count_steps(config, steps_per_epoch))
    return jax.jit(lambda: jax.vmap(schedule)(steps), out_shardings=same(mesh))()


def make_batch(config: Any, mesh: Mesh, task: Task) -> Callable[[int], Any]:
    """Returns a map from the step to its examples, split over the devices of `mesh`."""
    steps_per_epoch = task.train.examples // config.batch_size
    return batches_of(
        mesh,
        task.train,
        config.batch_size,
        task.order(),
        config.data_workers,
        key=lambda step: (config.seed, step // steps_per_epoch),
    )
