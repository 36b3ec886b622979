"""Other statistics that a trained network can infer by, found on training images."""

from __future__ import annotations

import functools
from typing import Any, Final, Literal

import jax
import numpy as np

from kalman_flax import compiler_options
from kalman_flax.inference.precise import precise_statistics
from train.engine.classification import Classification
from train.engine.experiment import Experiment
from train.engine.mesh import SPLIT, over_devices
from train.engine.step import Draws, TrainState, draw, replicas_of
from train.engine.task import of_kind

AUTO: Final = "auto"
#: what `choose_weight` chooses from
WEIGHTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


def parse_weight(text: str | None) -> float | Literal["auto"] | None:
    """Returns the example weight that a user asked for: a number, `AUTO`, or None.

    Raises:
        ValueError: it is anything else.
    """
    if text is None or text == AUTO:
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
    task = of_kind(experiment.task, Classification)
    split = task.train.take(min(task.test.examples, task.train.examples))

    def loss(weight: float) -> float:
        return task.evaluate(state, split, weight)["weighed_loss"]

    return min(WEIGHTS, key=loss)


def recompute(
    config: Any, experiment: Experiment, state: TrainState, batches: int
) -> TrainState:
    """Returns `state` with the precise statistics of the first `batches` training
    batches, split into micro-batches and augmented as in training."""

    task, mesh = experiment.task, experiment.mesh
    replicas = replicas_of(config, mesh)

    def on_device(state: TrainState, batch: Any, draws: Draws) -> Any:
        _, written = task.loss(task.network, state.variables, batch, *draws)
        return written["batch_stats"]

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def write(state: TrainState, batch: Any, step: jax.Array) -> Any:
        draws = draw(task, experiment.key, step, replicas)
        return over_devices(on_device, mesh, out=SPLIT)(state, batch, draws)

    stats = precise_statistics(
        lambda step: write(state, experiment.batch(step), step),
        state.batch_stats,
        range(batches),
        momentum=config.stats_momentum,
    )
    return state.replace(batch_stats=stats)
