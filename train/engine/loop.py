"""The training loop: resumes, shows itself, and stops at the first bad number."""

from __future__ import annotations

import contextlib
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict
from tqdm import tqdm

from configs import base
from train.engine import processes, trained_on
from train.engine import workdir as wd
from train.engine.diagnose import find_bad_number
from train.engine.experiment import Experiment, build
from train.engine.feed import Ahead
from train.engine.files import directory
from train.engine.initial import loaded
from train.engine.profile import profiler
from train.engine.run import NonFiniteError, Run
from train.engine.start import started
from train.engine.step import Metrics, TrainState

_norm = jax.jit(optax.tree.norm)


def train(
    config: ConfigDict, workdir: str | pathlib.Path, data_dir: str | None = None
) -> dict[str, Any]:
    """Trains as `config` says, from the last checkpoint in `workdir` if there is one.

    Args:
        config: as in `configs/base.py`.
        workdir: gets config.json, data.json, metrics.jsonl, tensorboard/, checkpoints/
            and, at the end, summary.json.
        data_dir: see `train.data.sets.load_dataset`.

    Returns:
        The summary. A finished run is not run again: its summary is read, and nothing
        written.

    Raises:
        ValueError: a bad config; an ``init_from`` of another network; a workdir of
            another config or other data, or of another run at work, or with damaged
            checkpoints alone, or with another damaged file; images that cannot be
            decoded.
        FileNotFoundError: the data set, or ``init_from``, is not there.
        NonFiniteError: a loss, a gradient or a parameter became NaN or infinite; the
            last good checkpoint stays.
        OSError: the disk is full, or the workdir cannot be written.
        processes.Stopped: SIGTERM or Ctrl-C came; where the run was is saved.
    """
    workdir = directory(workdir)
    base.check(config)
    wd.check_same(workdir, config)
    if (summary := wd.read_summary(workdir)) is not None:
        return summary
    # first: a bad config, or bad data, claims no workdir
    experiment = build(config, data_dir)
    data = trained_on.check(workdir, experiment.task, files=True)
    experiment = loaded(config, experiment, workdir)
    with contextlib.ExitStack() as stack:
        run = Run(config, workdir, stack)
        trained_on.keep(workdir, data)
        state = started(config, experiment, run.restore(experiment.state))
        loop = Loop(experiment, run)
        state = loop.train(state)
        summary = run.finish(experiment, state, loop.seconds)
        loop.give_way()
        return summary


class Loop:
    """Updates of a run, and now and then a log line, a test, a checkpoint."""

    def __init__(self, experiment: Experiment, run: Run):
        """Makes ready to train."""
        self.config, self.experiment, self.run = run.config, experiment, run
        per_epoch = experiment.steps_per_epoch
        self._total = experiment.total_steps
        self._checkpoint_steps = run.config.checkpoint_epochs * per_epoch
        self._eval_steps = run.config.eval_epochs * per_epoch
        self._rates = np.asarray(experiment.rates)
        self._started = time.monotonic() - run.log.seconds
        self._pending: list[Metrics] = []  # not yet looked at
        self._parameter_norm = float("nan")  # at the last look
        self._stop = False  # asked for in the end

    @property
    def seconds(self) -> float:
        """That training took so far, over all interruptions."""
        return time.monotonic() - self._started

    def train(self, state: TrainState) -> TrainState:
        """Returns the state after the last update.

        Raises:
            NonFiniteError: a number became NaN or infinite.
            processes.Stopped: as asked; all is saved.
        """
        first, folder = int(state.step), self.run.workdir / "profile"
        steps = range(first, self._total)
        with (
            processes.stop_requests() as stop_asked,
            profiler(self.config.profile_steps, folder) as profile,
            self._progress(first) as bar,
            Ahead(self.experiment.batch, steps) as batches,
        ):
            processes.meet()
            if first and self._due(first, self._eval_steps) and not self.run.final:
                self._test(first, state)  # killed between checkpoint and test
            for step in steps:
                profile(step, state)
                state = self._update(step, state, batches.next(self._pending[-1:]))
                bar.update(self.config.batch_size)
                self._after(step + 1, state, stop_asked(step + 1), bar, batches)
            self._stop = stop_asked(self._total + 1)
        return state

    def give_way(self) -> None:
        """To be called when all is written.

        Raises:
            processes.Stopped: that was asked after the last update.
        """
        if self._stop:
            raise processes.Stopped("stopped as asked; this run had come to its end.")

    def _after(
        self, done: int, state: TrainState, stop: bool, bar: tqdm, batches: Ahead
    ) -> None:
        """What is due after an update: a log line, a checkpoint, a stop, a test."""
        if self._due(done, self.config.log_steps):
            self._report(done, state, bar, batches.waited())
        if stop or self._due(done, self._checkpoint_steps):
            self._look(done, state)
            self.run.save(done, state)
        if stop and done < self._total:
            raise processes.Stopped(
                f"stopped as asked, after step {done} of {self._total}; the same"
                " command goes on from there."
            )
        if self._due(done, self._eval_steps):
            self._test(done, state)

    def _due(self, done: int, every: int) -> bool:
        """Whether something is due after `done` updates; in the end all is."""
        return done == self._total or done % every == 0

    def _progress(self, start: int) -> tqdm:
        config = self.config
        return tqdm(
            total=self._total * config.batch_size,
            initial=start * config.batch_size,
            desc=f"{config.norm}, batch {config.batch_size}, micro-batch"
            f" {config.micro_batch_size}, {self.experiment.mesh.size} device(s), seed"
            f" {config.seed}",
            unit="img",
            unit_scale=True,
            mininterval=1.0,
            disable=not processes.primary(),
        )

    def _update(self, step: int, state: TrainState, batch: Any) -> TrainState:
        """One update; its metrics wait for the next look."""
        before = jax.tree.map(jnp.copy, state) if self.config.debug_nans else state
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

    def _look(self, done: int, state: TrainState) -> list[Metrics]:
        """Fetches the metrics since the last look, the newest after `done` steps."""
        seen, self._pending = self._fetch(done, self._pending), []
        self._look_at_parameters(done, state)
        return seen

    def _look_at_parameters(self, done: int, state: TrainState) -> None:
        self._parameter_norm = float(_norm(state.params))
        self.run.check({"parameter_norm": self._parameter_norm}, done)

    def _fetch(self, done: int, pending: list[Metrics]) -> list[Metrics]:
        seen = jax.device_get(pending)
        for step, metrics in enumerate(seen, done - len(seen) + 1):
            self.run.check(metrics, step)
        return seen

    def _report(
        self, done: int, state: TrainState, bar: tqdm, data_wait: float
    ) -> None:
        """Logs means over the updates since the last look; a checkpoint is a look too,
        so that a run resumed from it logs the same."""
        seen = self._look(done, state)
        means = jax.tree.map(lambda *values: float(np.mean(values)), *seen)
        memory = wd.memory_in_use()
        shown = self.experiment.task.shown.items()
        bar.set_postfix(
            {name: format(means[name], spec) for name, spec in shown},
            memory=f"{memory / 2**30:.1f}GiB",
        )
        self.run.log.write(
            done,
            self.seconds,
            learning_rate=float(self._rates[done - 1]),
            images_per_second=bar.format_dict["rate"] or 0.0,
            data_wait=data_wait,
            memory_bytes=memory,
            parameter_norm=self._parameter_norm,
            **{f"train_{name}": value for name, value in means.items()},
        )

    def _test(self, done: int, state: TrainState) -> None:
        task = self.experiment.task
        found = self.run.final = task.evaluate(state, task.test)
        self.run.log.write(
            done, self.seconds, **{f"test_{k}": v for k, v in found.items()}
        )
