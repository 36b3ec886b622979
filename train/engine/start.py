"""Before the first update: passes over training batches that set the statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import traverse_util

from kalman_flax import calibrate, compiler_options, merge_running
from train.engine.experiment import Experiment
from train.engine.mesh import DEVICES, over_devices
from train.engine.step import (
    Draws,
    TrainState,
    draw,
    in_turn,
    join,
    replicas_of,
    split_evenly,
)


def started(config: Any, experiment: Experiment, state: TrainState) -> TrainState:
    """Returns `state` as the first update is to find it.

    ``config.calibrate_batches`` passes set its statistics, over the batches of the
    first updates with their augmentation: the same for one seed, on any number of
    devices. A run that goes on has them in its checkpoint.

    Raises:
        ValueError: the network keeps no statistics, or they are not finite.
    """
    if int(state.step):
        return state
    if not config.calibrate_batches:
        _warn_of_no_start(state)
        return state
    forward = jax.jit(_forward(config, experiment), compiler_options=compiler_options())
    batches = (
        (experiment.batch(step), experiment.key, jnp.int32(step))
        for step in range(config.calibrate_batches)
    )
    variables = calibrate(forward, state.variables, batches)
    return state.replace(batch_stats=variables["batch_stats"])


def _forward(config: Any, experiment: Experiment) -> Callable[..., Any]:
    """The pass of an update: what its micro-batches write, merged over all of them."""
    task, mesh = experiment.task, experiment.mesh
    replicas = replicas_of(config, mesh)

    def observe(variables: Any, part: tuple[Any, Draws]) -> tuple[Any, Any]:
        batch, draws = part
        _, written = task.loss(task.network, variables, batch, *draws)
        return variables, written.get("batch_stats", {})

    def on_device(variables: Any, batch: Any, draws: Draws) -> Any:
        parts = split_evenly((batch, draws), config.accumulate)
        _, written = in_turn(observe, variables, parts)
        return merge_running(join(written), config.stats_momentum, DEVICES)

    def forward(variables: Any, given: Any) -> tuple[None, dict[str, Any]]:
        batch, key, step = given
        draws = draw(task, key, step, replicas)
        stats = over_devices(on_device, mesh)(variables, batch, draws)
        return None, {"batch_stats": stats}

    return forward


def _warn_of_no_start(state: TrainState) -> None:
    """Says that corrections of `KalmanNorm.calibrate` begin with nothing observed."""
    stats: dict[Any, Any] = traverse_util.flatten_dict(state.batch_stats)
    weights = (s for path, s in stats.items() if path[-1] == "weight")
    if any(not jnp.any(weight) for weight in weights):
        logging.warning(
            "the normaliser calibrates its predictions and begins with nothing"
            " observed; set calibrate_batches, 10 are enough"
        )
