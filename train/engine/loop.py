"""The training loop: resumes, shows itself, and stops at the first bad number."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from train.data.batches import Split
from train.engine import processes
from train.engine import workdir as wd
from train.engine.diagnose import find_bad_number
from train.engine.experiment import Experiment, build
from train.engine.feed import Ahead
from train.engine.profile import profiler
from train.engine.step import Metrics, TrainState

_norm = jax.jit(optax.tree.norm)


class NonFiniteError(FloatingPointError):
    """A loss, a gradient or a parameter became NaN or infinite."""


def train(
    config: ConfigDict, workdir: str | pathlib.Path, data_dir: str | None = None
) -> dict[str, Any]:
    """Trains as `config` says, from the last checkpoint in `workdir` if there is one.

    Args:
        config: as in `configs/base.py`.
        workdir: gets config.json, metrics.jsonl, tensorboard/, checkpoints/ and, at the
            end, summary.json.
        data_dir: see `train.data.sets.load_dataset`.

    Returns:
        The summary. A finished run is not run again: its summary is read.

    Raises:
        ValueError: a bad config; a workdir of another config, or of another run at
            work, or with damaged checkpoints alone.
        FileNotFoundError: the data set is not there.
        NonFiniteError: a loss, a gradient or a parameter became NaN or infinite; the
            last good checkpoint stays.
        OSError: the disk is full, or the workdir cannot be written.
        processes.Stopped: SIGTERM or Ctrl-C came; where the run was is saved.
    """
    workdir = pathlib.Path(workdir)
    if (workdir / wd.SUMMARY).exists():
        wd.claim(workdir, config)
        return json.loads((workdir / wd.SUMMARY).read_text())
    experiment = build(config, data_dir)  # first: a bad config claims no workdir
    with contextlib.ExitStack() as stack:
        run = OpenRun(config, workdir, stack)
        state = run.restore(experiment.state)
        loop = Loop(experiment, [run], lambda tree, number: tree)
        state = loop.train(state, int(state.step))
        summary = run.finish(experiment, state, loop.seconds)
        loop.give_way()
        return summary


class OpenRun:
    """A run at work: its directory, and what came of it.

    Attributes:
        final: of the last test; empty before, and after a checkpoint that was not
            tested yet.
        parameter_norm: of the last look; NaN before.
        error: why it ended before its end; None if it did not.
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
        processes.wait_for_all("workdir claimed")
        processes.check_equal(
            f"whether they see {workdir}, which must be on a disk that they share",
            (workdir / wd.CONFIG).exists(),
        )
        self.config, self.workdir = config, workdir
        self.checkpoints = stack.enter_context(wd.open_checkpoints(workdir))
        self._stack = stack
        self.final: dict[str, float] = {}
        self.parameter_norm = float("nan")
        self.error: NonFiniteError | None = None

    def restore(self, state: TrainState) -> TrainState:
        """Returns the state of the last checkpoint, or `state`; the log goes on
        from there."""
        state = wd.restore(self.checkpoints, state)
        step = int(state.step)
        processes.check_equal("the step of their last checkpoint", step)
        wd.forget_after(self.checkpoints, step)
        self.log = wd.MetricsLog(self.workdir, step)
        self._stack.callback(self.log.close)
        self.final = wd.last_test(self.workdir, step)
        processes.check_equal("what their logs say of the last test", len(self.final))
        return state

    def check(self, metrics: dict[str, float], step: int) -> None:
        """Looks at the metrics of update `step`; sets `error` if one is not finite."""
        if self.error or all(np.isfinite(value) for value in metrics.values()):
            return
        kept = self.checkpoints.latest_step()
        found = ", ".join(f"{k} {float(v):g}" for k, v in metrics.items())
        self.error = NonFiniteError(
            f"training stopped at step {step}: {found}. "
            + (
                f"The last good checkpoint, of step {kept}, is kept in"
                f" {self.checkpoints.directory}."
                if kept is not None
                else "There is no checkpoint yet."
            )
            + " A smaller learning_rate or a longer warm-up often helps."
        )

    def finish(
        self, experiment: Experiment, state: TrainState, seconds: float
    ) -> dict[str, Any]:
        """Returns the summary, and writes it."""
        config = self.config
        lines = wd.read_metrics(self.workdir)
        losses = [line["train_loss"] for line in lines if "train_loss" in line]
        summary = {
            "norm": config.norm,
            "batch_size": config.batch_size,
            "micro_batch_size": config.micro_batch_size,
            "learning_rate": config.learning_rate,
            "devices": experiment.mesh.size,
            "seed": config.seed,
            "final_train_loss": losses[-1],
            **{f"test_{name}": value for name, value in self.final.items()},
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            "steps": int(state.step),
            "train_images": experiment.train.examples,
            "test_images": experiment.test.examples,
            "seconds": round(seconds, 1),
            **wd.provenance(),
        }
        if processes.primary():
            wd.write_json(self.workdir / wd.SUMMARY, summary)
        return summary


class Loop:
    """Updates, and now and then a log line, a test, a checkpoint, of one run or more.

    Several runs share the steps of one experiment and differ in what `pick` finds.
    """

    def __init__(
        self,
        experiment: Experiment,
        runs: Sequence[OpenRun],
        pick: Callable[[Any, int], Any],
    ):
        """Makes ready to train.

        Args:
            experiment: whose `train_step` and `batch` are those of all runs.
            runs: of equal configs but for what `pick` tells apart.
            pick: from states or metrics of all runs to those of run number so many.
        """
        self.config, self.experiment = runs[0].config, experiment
        self.runs, self._pick = runs, pick
        self._started = time.monotonic() - max(run.log.seconds for run in runs)
        self._pending: list[Metrics] = []  # not yet looked at
        self._stop = False  # asked for in the end

    @property
    def seconds(self) -> float:
        """That training took so far, over all interruptions."""
        return time.monotonic() - self._started

    @property
    def _alive(self) -> list[tuple[int, OpenRun]]:
        return [(i, run) for i, run in enumerate(self.runs) if run.error is None]

    def train(self, state: Any, start: int) -> Any:
        """Returns the state after the last update; `state` is that after `start`.

        Raises:
            NonFiniteError: of the first run, when no run is left without.
            processes.Stopped: as asked; all is saved.
        """
        config, experiment = self.config, self.experiment
        total = experiment.total_steps
        checkpoint_steps = config.checkpoint_epochs * experiment.steps_per_epoch
        eval_steps = config.eval_epochs * experiment.steps_per_epoch
        folder = self.runs[0].workdir / "profile"
        with (
            processes.stop_requests() as stop_asked,
            profiler(config.profile_steps, folder) as profile,
            self._progress(start) as bar,
            Ahead(experiment.batch, range(start, total)) as batches,
        ):
            if start == total or (start and start % eval_steps == 0):
                # Some may have been tested before they were killed.
                untested = [(i, run) for i, run in self._alive if not run.final]
                self._test(start, state, untested)
            for step in range(start, total):
                profile(step, state)
                state = self._update(step, state, batches.next(self._pending[-1:]))
                bar.update(config.batch_size * len(self.runs))
                done = step + 1
                last, stop = done == total, stop_asked(done)
                if last or done % config.log_steps == 0:
                    self._report(done, state, bar, batches.waited())
                if last or stop or done % checkpoint_steps == 0:
                    self._look(done, state)
                    for i, run in self._alive:
                        wd.save(run.checkpoints, done, self._pick(state, i))
                if stop and not last:
                    raise processes.Stopped(
                        f"stopped as asked, after step {done} of {total}; the same"
                        " command goes on from there."
                    )
                if last or done % eval_steps == 0:
                    self._test(done, state, self._alive)
            self._stop = stop_asked(total + 1)
        return state

    def give_way(self) -> None:
        """To be called when all is written.

        Raises:
            processes.Stopped: that was asked after the last update.
        """
        if self._stop:
            raise processes.Stopped("stopped as asked; this run had come to its end.")

    def _progress(self, start: int) -> tqdm:
        config, experiment, runs = self.config, self.experiment, len(self.runs)
        images = config.batch_size * runs
        what = f"seed {config.seed}" if runs == 1 else f"{runs} runs"
        return tqdm(
            total=experiment.total_steps * images,
            initial=start * images,
            desc=f"{config.norm}, batch {config.batch_size}, micro-batch"
            f" {config.micro_batch_size}, {experiment.mesh.size} device(s), {what}",
            unit="img",
            unit_scale=True,
            mininterval=1.0,
            disable=not processes.primary(),
        )

    def _update(self, step: int, state: Any, batch: Split) -> Any:
        """One update; its metrics wait for the next look."""
        before = jax.tree.map(jnp.copy, state) if self.config.debug_nans else None
        state, metrics = self.experiment.train_step(state, batch)
        self._pending.append(metrics)
        if self.config.debug_nans:
            try:
                self._fetch(step + 1, [metrics])
                self._look_at_parameters(step + 1, state)
            except NonFiniteError as error:
                place = find_bad_number(self.experiment, self.config, before, batch)
                raise NonFiniteError(f"{error}\nWhere it began: {place}.") from None
        return state

    def _look(self, done: int, state: Any) -> list[Metrics]:
        """Fetches the metrics since the last look, the newest after `done` steps."""
        seen, self._pending = self._fetch(done, self._pending), []
        self._look_at_parameters(done, state)
        return seen

    def _look_at_parameters(self, done: int, state: Any) -> None:
        for i, run in self._alive:
            run.parameter_norm = float(_norm(self._pick(state, i).params))
            run.check({"parameter_norm": run.parameter_norm}, done)
        self._check_any_left()

    def _fetch(self, done: int, pending: list[Metrics]) -> list[Metrics]:
        seen = jax.device_get(pending)
        for step, metrics in enumerate(seen, done - len(seen) + 1):
            for i, run in self._alive:
                run.check(self._pick(metrics, i), step)
            self._check_any_left()
        return seen

    def _check_any_left(self) -> None:
        if not self._alive:
            raise self.runs[0].error

    def _report(self, done: int, state: Any, bar: tqdm, data_wait: float) -> None:
        """Logs means over the updates since the last look; a checkpoint is a look too,
        so that a run resumed from it logs the same."""
        seen = self._look(done, state)
        means = jax.tree.map(lambda *values: np.mean(values, axis=0), *seen)
        memory = wd.memory_in_use()
        bar.set_postfix(
            loss=f"{np.nanmean(means['loss']):.3f}",
            accuracy=f"{np.nanmean(means['accuracy']):.1%}",
            memory=f"{memory / 2**30:.1f}GiB",
        )
        rate = self.experiment.schedule(done - 1)
        for i, run in self._alive:
            run.log.write(
                done,
                self.seconds,
                learning_rate=float(self._pick(rate, i)),
                images_per_second=bar.format_dict["rate"] or 0.0,
                data_wait=data_wait,
                memory_bytes=memory,
                parameter_norm=run.parameter_norm,
                **{
                    f"train_{name}": float(value)
                    for name, value in self._pick(means, i).items()
                },
            )

    def _test(self, done: int, state: Any, runs: list[tuple[int, OpenRun]]) -> None:
        for i, run in runs:
            run.final = self.experiment.evaluate(
                self._pick(state, i), self.experiment.test
            )
            run.log.write(
                done, self.seconds, **{f"test_{k}": v for k, v in run.final.items()}
            )
