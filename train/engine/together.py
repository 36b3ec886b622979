"""Runs that differ in seed and learning rate alone, trained at once by `jax.vmap`.

They are compiled once, which takes longer on a GPU than a short run does. Side by side
they are as fast as one after the other (docs/performance.md has the numbers).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from train.data.batches import Split
from train.engine import workdir as wd
from train.engine.experiment import (
    Experiment,
    build,
    make_batch,
    make_optimizer,
    make_schedule,
)
from train.engine.loop import Loop, NonFiniteError, OpenRun
from train.engine.mesh import same
from train.engine.step import init_state, jit_update, make_update

#: keys of a config in which runs may differ that train at once
FREE = ("seed", "learning_rate")


def train_together(
    configs: Sequence[ConfigDict],
    workdirs: Sequence[pathlib.Path],
    data_dir: str | None = None,
    at_once: int = 1,
) -> dict[pathlib.Path, NonFiniteError]:
    """Trains what is not finished, up to `at_once` runs side by side.

    A run comes to what it comes to by itself, but for rounding (and tests by
    `kalman_mc`, which draw by the seed of the first), and leaves the same in its
    workdir; its summary gives the time as its share of that of all. One that diverges
    is left behind, and the others go on.

    Args:
        configs: of the runs; equal but for `FREE`.
        workdirs: of the runs, see `train.engine.loop.train`.
        data_dir: see `train.data.sets.load_dataset`.
        at_once: runs that one program trains; the memory of a step goes with it.

    Returns:
        What became of those that diverged, by workdir.

    Raises:
        ValueError: configs that differ otherwise, or that profile or look for NaNs; see
            `train.engine.loop.train` for what else.
    """
    first = configs[0]
    if len({in_common(config) for config in configs}) > 1:
        raise ValueError(
            f"runs trained at once may differ in {' and '.join(FREE)} alone."
        )
    if first.profile_steps or first.debug_nans:
        raise ValueError(
            "profile_steps and debug_nans are for one run, not for several at once."
        )
    missing = [
        (config, workdir)
        for config, workdir in zip(configs, workdirs, strict=True)
        if not (workdir / wd.SUMMARY).exists()
    ]
    errors: dict[pathlib.Path, NonFiniteError] = {}
    if not missing:
        return errors
    program = _Program(first, build(first, data_dir))
    for start in range(0, len(missing), at_once):
        with contextlib.ExitStack() as stack:
            part = missing[start : start + at_once]
            runs = [OpenRun(config, workdir, stack) for config, workdir in part]
            for alike in _by_step(runs, program.restore(runs)):
                program.train(*alike)
            errors |= {run.workdir: run.error for run in runs if run.error}
    return errors


def in_common(config: ConfigDict) -> str:
    """Returns what runs must have in common to train at once."""
    return json.dumps(
        {k: v for k, v in json.loads(config.to_json()).items() if k not in FREE}
    )


def _by_step(
    runs: Sequence[OpenRun], states: Sequence[Any]
) -> Iterator[tuple[list[OpenRun], list[Any]]]:
    """Sorts the runs by the step they go on from: one if nothing was killed between
    two checkpoints."""
    steps = [int(state.step) for state in states]
    for step in sorted(set(steps)):
        chosen = [i for i, other in enumerate(steps) if other == step]
        yield [runs[i] for i in chosen], [states[i] for i in chosen]


class _Program:
    """One update of all runs, and how each begins."""

    def __init__(self, config: ConfigDict, experiment: Experiment):
        self._config, self._experiment = config, experiment

        def optimizer(rate: jax.Array) -> Any:
            schedule = make_schedule(config, experiment.steps_per_epoch, rate)
            return make_optimizer(config, schedule)

        def init(seed: jax.Array, rate: jax.Array) -> Any:
            shape = experiment.train.image_shape
            return init_state(experiment.network, optimizer(rate), seed, shape)

        def update(state: Any, batch: Split, seed: jax.Array, rate: jax.Array) -> Any:
            return make_update(
                experiment.network,
                optimizer(rate),
                experiment.standardize,
                config,
                experiment.mesh,
            )(state, batch, seed)

        self._init = jax.jit(jax.vmap(init), out_shardings=same(experiment.mesh))
        self._update = jit_update(jax.vmap(update))
        self._stack = jax.jit(_stack)

    def restore(self, runs: Sequence[OpenRun]) -> list[Any]:
        """Returns the state of each, from its checkpoint or from the start."""
        states = self._init(*_free(runs))
        return [run.restore(_pick(states, i)) for i, run in enumerate(runs)]

    def train(self, runs: Sequence[OpenRun], states: Sequence[Any]) -> None:
        """Trains to the end, and writes the summaries."""
        experiment, config = self._experiment, self._config
        seeds, rates = _free(runs)
        experiment = dataclasses.replace(
            experiment,
            batch=self._batches(runs),
            train_step=lambda state, batch: self._update(state, batch, seeds, rates),
            schedule=make_schedule(config, experiment.steps_per_epoch, rates),
        )
        loop = Loop(experiment, runs, _pick)
        try:
            end = loop.train(self._stack(*states), int(states[0].step))
        except NonFiniteError:  # of all of them
            return
        for i, run in enumerate(runs):
            if run.error is None:
                run.finish(experiment, _pick(end, i), loop.seconds / len(runs))
        loop.give_way()

    def _batches(self, runs: Sequence[OpenRun]) -> Callable[[int], Split]:
        """From the step to the batches of all runs, with a leading axis of runs; those
        of one seed have the same."""
        experiment = self._experiment
        of_seed = {
            run.config.seed: make_batch(run.config, experiment.mesh, experiment.train)
            for run in runs
        }

        def batches(step: int) -> Split:
            found = {seed: batch(step) for seed, batch in of_seed.items()}
            return self._stack(*(found[run.config.seed] for run in runs))

        return batches


def _free(runs: Sequence[OpenRun]) -> tuple[np.ndarray, np.ndarray]:
    seeds = np.array([run.config.seed for run in runs], np.int32)
    return seeds, np.array([run.config.learning_rate for run in runs], np.float32)


def _stack(*trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _pick(tree: Any, number: int) -> Any:
    on_device = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))
    return (_pick_on_device if on_device else _pick_in_turn)(tree, number)


def _pick_in_turn(tree: Any, number: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[number], tree)


_pick_on_device = jax.jit(_pick_in_turn)  # one call in place of one a leaf
