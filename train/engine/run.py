"""A run at work in its directory: what it claims, keeps and leaves."""

from __future__ import annotations

import contextlib
import pathlib
import zlib
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from train.engine import metrics, processes
from train.engine import workdir as wd
from train.engine.experiment import Experiment
from train.engine.normalizer import count_predicted
from train.engine.step import TrainState


class NonFiniteError(FloatingPointError):
    """A loss, a gradient or a parameter became NaN or infinite."""


class Run:
    """A run at work.

    Attributes:
        final: what the last test found; empty before, and after a checkpoint that was
            not tested yet.
    """

    def __init__(
        self, config: ConfigDict, workdir: pathlib.Path, stack: contextlib.ExitStack
    ):
        """Claims `workdir`, until the `stack` is left.

        Raises:
            ValueError: it is another run's.
        """
        # first: one that was told otherwise must not find the other's claim
        processes.check_equal("their config", zlib.crc32(config.to_json().encode()))
        if processes.primary():
            stack.enter_context(wd.locked(workdir))
        wd.claim(workdir, config)
        multihost_utils.sync_global_devices("workdir claimed")
        processes.check_equal(
            f"whether they see {workdir}, which must be on a disk that they share",
            (workdir / wd.CONFIG).exists(),
        )
        self.config, self.workdir = config, workdir
        self._checkpoints = stack.enter_context(wd.open_checkpoints(workdir))
        self._stack = stack
        self.final: dict[str, float] = {}

    def restore(self, state: TrainState) -> TrainState:
        """Returns the state of the last checkpoint, or `state`; the log goes on
        from there."""
        state = wd.restore(self._checkpoints, state)
        step = int(state.step)
        processes.check_equal("the step of their last checkpoint", step)
        wd.forget_after(self._checkpoints, step)
        self.log = metrics.MetricsLog(self.workdir, step)
        self._stack.callback(self.log.close)
        self.final = metrics.last_test(self.workdir, step)
        processes.check_equal("what their logs say of the last test", len(self.final))
        return state

    def save(self, step: int, state: TrainState) -> None:
        """Saves a checkpoint."""
        wd.save(self._checkpoints, step, state)

    def check(self, metrics: dict[str, Any], step: int) -> None:
        """Looks at the metrics of update `step`.

        Raises:
            NonFiniteError: one is not finite.
        """
        if all(np.isfinite(value) for value in metrics.values()):
            return
        kept = self._checkpoints.latest_step()
        found = ", ".join(f"{k} {float(v):g}" for k, v in metrics.items())
        raise NonFiniteError(
            f"training stopped at step {step}: {found}. "
            + (
                f"The last good checkpoint, of step {kept}, is kept in"
                f" {self._checkpoints.directory}."
                if kept is not None
                else "There is no checkpoint yet."
            )
            + " A smaller learning_rate or a longer warm-up often helps."
        )

    def finish(
        self, experiment: Experiment, state: TrainState, seconds: float
    ) -> dict[str, Any]:
        """Returns the summary, and writes it."""
        config, task = self.config, experiment.task
        lines = metrics.read_metrics(self.workdir)
        losses = [line["train_loss"] for line in lines if "train_loss" in line]
        if not losses:
            logging.warning(
                "%s has no training loss, so it was lost: the summary goes without",
                self.workdir / metrics.METRICS,
            )
        validated = {}
        if task.validation is not None:
            validated = task.evaluate(state, task.validation)
        summary = {
            "norm": config.norm,
            "batch_size": config.batch_size,
            "micro_batch_size": config.micro_batch_size,
            "learning_rate": config.learning_rate,
            "devices": experiment.mesh.size,
            "seed": config.seed,
            "final_train_loss": losses[-1] if losses else None,
            **{f"test_{name}": value for name, value in self.final.items()},
            **{f"validation_{name}": v for name, v in validated.items()},
            "headline": f"test_{task.headline}",
            **count_predicted(task.network, state.variables, task.inputs()),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "steps": int(state.step),
            "train_images": task.train.examples,
            "test_images": task.test.examples,
            "seconds": round(seconds, 1),
            **wd.provenance(),
        }
        if processes.primary():
            wd.write_json(self.workdir / wd.SUMMARY, summary)
        return summary
