"""The training loop: resumes, shows itself, and stops at the first bad number."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from tqdm import tqdm

from train import processes
from train import workdir as wd
from train.data import Split
from train.diagnose import find_bad_number
from train.experiment import Experiment, build
from train.feed import Ahead
from train.profile import check_steps, profiler


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
        data_dir: see `train.sets.load_dataset`.

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
    check_steps(config.profile_steps)  # first: a bad config claims no workdir
    experiment = build(config, data_dir)
    with contextlib.ExitStack() as stack:
        if processes.primary():
            stack.enter_context(wd.locked(workdir))
        wd.claim(workdir, config)
        checkpoints = stack.enter_context(wd.open_checkpoints(workdir))
        state = wd.restore(checkpoints, experiment.state)
        wd.forget_after(checkpoints, int(state.step))
        log = wd.MetricsLog(workdir, int(state.step))
        stack.callback(log.close)
        run = _Run(config, experiment, checkpoints, log, workdir)
        state = run.train(state)
        summary = _summary(config, experiment, run, state, wd.read_metrics(workdir))
        if processes.primary():
            wd.write_json(workdir / wd.SUMMARY, summary)
    return summary


class _Run:
    """One call of `train`: steps, and now and then a log line, a test, a checkpoint."""

    def __init__(
        self,
        config: ConfigDict,
        experiment: Experiment,
        checkpoints: ocp.CheckpointManager,
        log: wd.MetricsLog,
        workdir: pathlib.Path,
    ):
        self.config, self.experiment, self.workdir = config, experiment, workdir
        self.checkpoints, self.log = checkpoints, log
        self.started = time.monotonic() - log.seconds
        self.pending: list[dict[str, jax.Array]] = []  # metrics not yet looked at
        self.final: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def train(self, state: Any) -> Any:
        config, experiment = self.config, self.experiment
        start, total = int(state.step), experiment.total_steps
        checkpoint_steps = config.checkpoint_epochs * experiment.steps_per_epoch
        eval_steps = config.eval_epochs * experiment.steps_per_epoch
        folder = self.workdir / "profile"
        with (
            processes.stop_requests() as stop_asked,
            profiler(config.profile_steps, folder) as profile,
            self._progress(start) as bar,
            Ahead(experiment.batch, range(start, total)) as batches,
        ):
            for step in range(start, total):
                profile(step, state)
                state = self._update(step, state, batches.next(self.pending[-1:]))
                bar.update(config.batch_size)
                done = step + 1
                last, stop = done == total, stop_asked(done)
                if last or done % config.log_steps == 0:
                    self._report(done, bar, batches.waited())
                if last or stop or done % checkpoint_steps == 0:
                    self._look(done)
                    wd.save(self.checkpoints, done, state)
                if stop and not last:
                    raise processes.Stopped(
                        f"stopped as asked, after step {done} of {total}; the same"
                        " command goes on from there."
                    )
                if last or done % eval_steps == 0:
                    self._test(done, state)
        if not self.final:  # every step was done before: killed before the summary
            self._test(total, state)
        return state

    def _progress(self, start: int) -> tqdm:
        config, experiment = self.config, self.experiment
        return tqdm(
            total=experiment.total_steps * config.batch_size,
            initial=start * config.batch_size,
            desc=f"{config.norm}, batch {config.batch_size}, micro-batch"
            f" {config.micro_batch_size}, {experiment.mesh.size} device(s), seed"
            f" {config.seed}",
            unit="img",
            unit_scale=True,
            mininterval=1.0,
            disable=not processes.primary(),
        )

    def _update(self, step: int, state: Any, batch: Split) -> Any:
        """One update; its metrics wait for the next look."""
        before = jax.tree.map(jnp.copy, state) if self.config.debug_nans else None
        state, metrics = self.experiment.train_step(state, batch)
        self.pending.append(metrics)
        if self.config.debug_nans:
            try:
                self._fetch(step + 1, [metrics])
            except NonFiniteError as error:
                place = find_bad_number(self.experiment, self.config, before, batch)
                raise NonFiniteError(f"{error}\nWhere it began: {place}.") from None
        return state

    def _look(self, done: int) -> list[dict[str, float]]:
        """Fetches the metrics since the last look, the newest after `done` steps."""
        seen, self.pending = self._fetch(done, self.pending), []
        return seen

    def _fetch(
        self, done: int, pending: list[dict[str, jax.Array]]
    ) -> list[dict[str, float]]:
        seen = jax.device_get(pending)
        for step, metrics in enumerate(seen, done - len(seen) + 1):
            if not all(np.isfinite(value) for value in metrics.values()):
                kept = self.checkpoints.latest_step()
                found = ", ".join(f"{k} {float(v):g}" for k, v in metrics.items())
                raise NonFiniteError(
                    f"training stopped at step {step}: {found}. "
                    + (
                        f"The last good checkpoint, of step {kept}, is kept in"
                        f" {self.checkpoints.directory}."
                        if kept is not None
                        else "There is no checkpoint yet."
                    )
                    + " A smaller learning_rate or a longer warm-up often helps."
                )
        return seen

    def _report(self, done: int, bar: tqdm, data_wait: float) -> None:
        """Logs means over the updates since the last look; a checkpoint is a look too,
        so that a run resumed from it logs the same."""
        seen = self._look(done)
        if not seen:  # a checkpoint has just looked
            return
        means = {k: float(np.mean([m[k] for m in seen])) for k in seen[0]}
        memory = wd.memory_in_use()
        bar.set_postfix(
            loss=f"{means['loss']:.3f}",
            accuracy=f"{means['accuracy']:.1%}",
            memory=f"{memory / 2**30:.1f}GiB",
        )
        self.log.write(
            done,
            self.seconds,
            learning_rate=float(self.experiment.schedule(done - 1)),
            images_per_second=bar.format_dict["rate"] or 0.0,
            data_wait=data_wait,
            memory_bytes=memory,
            **{f"train_{name}": value for name, value in means.items()},
        )

    def _test(self, done: int, state: Any) -> None:
        self.final = self.experiment.evaluate(state, self.experiment.test)
        self.log.write(
            done, self.seconds, **{f"test_{k}": v for k, v in self.final.items()}
        )


def _summary(
    config: ConfigDict,
    experiment: Experiment,
    run: _Run,
    state: Any,
    lines: list[dict[str, float]],
) -> dict[str, Any]:
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    return {
        "norm": config.norm,
        "batch_size": config.batch_size,
        "micro_batch_size": config.micro_batch_size,
        "learning_rate": config.learning_rate,
        "devices": experiment.mesh.size,
        "seed": config.seed,
        "final_train_loss": losses[-1],
        **{f"test_{name}": value for name, value in run.final.items()},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "steps": int(state.step),
        "train_images": experiment.train.examples,
        "test_images": experiment.test.examples,
        "seconds": round(run.seconds, 1),
        **wd.provenance(),
    }
