"""Runs of one experiment that differ in a few keys, as several commands make them."""

from __future__ import annotations

import copy
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from train.data.sets import check_prepared
from train.engine import initial, metrics
from train.engine import workdir as wd
from train.engine.loop import train
from train.engine.run import NonFiniteError
from train.engine.settings import check
from train.studies import report


class Entry(NamedTuple):
    """A row of a table: what it is called, and the config keys that it sets."""

    variant: str
    overrides: dict[str, Any]


def configure(config: ConfigDict, entry: Entry, seed: int) -> ConfigDict:
    """Returns the config of one run.

    Raises:
        ValueError: a variant sets a key that there is not, or a value of another type.
    """
    config = copy.deepcopy(config)
    config.variants = ()  # a run is the same in whichever study
    for key, value in entry.overrides.items():
        if key not in config:
            raise ValueError(
                f"variant {entry.variant!r} sets {key!r}, which is no key of a config."
            )
        try:
            config[key] = value
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"variant {entry.variant!r} sets {key}: {error}"
            ) from error
    config.seed += seed
    return config


class Job(NamedTuple):
    """A run to be made: its config, what it is called, its directory."""

    config: ConfigDict
    variant: str
    run_dir: pathlib.Path


def run_all(jobs: Sequence[Job], data_dir: str | None) -> list[report.Run]:
    """Trains, or goes on, or reads what finished runs left in their directories; one
    that diverges is a result as well.

    Args:
        jobs: the runs, in the order to make them in.
        data_dir: see `train.data.sets.load_dataset`.

    Raises:
        ValueError, FileNotFoundError: a bad config, a directory of another run or of
            two, a data set or an ``init_from`` that is not there: of all jobs, before
            any is run.
    """
    shared = Counter(job.run_dir for job in jobs)
    for job in jobs:
        if shared[job.run_dir] > 1:
            raise ValueError(f"{job.run_dir} would be the directory of two runs.")
        check(job.config)
        check_prepared(job.config.dataset, data_dir)
        wd.check_same(job.run_dir, job.config)
        initial.check(job.config, job.run_dir)
    return [_run(job, data_dir) for job in jobs]


def _run(job: Job, data_dir: str | None) -> report.Run:
    try:
        return _report(job, train(job.config, job.run_dir, data_dir))
    except NonFiniteError as error:
        return _report_diverged(job, error)


def _report_diverged(job: Job, error: NonFiniteError) -> report.Run:
    print(f"{job.run_dir.name} diverged: {error}")
    keys = ("norm", "batch_size", "micro_batch_size", "learning_rate", "seed")
    return _report(job, {key: job.config[key] for key in keys} | {"diverged": True})


def _report(job: Job, summary: dict[str, Any]) -> report.Run:
    return report.Run(
        {"variant": job.variant} | summary, metrics.read_metrics(job.run_dir)
    )
