"""Runs of one experiment that differ in a few keys, as several commands make them."""

from __future__ import annotations

import copy
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from train import report
from train import workdir as wd
from train.loop import NonFiniteError, train


class Entry(NamedTuple):
    """A row of a table: what it is called, and the config keys that it sets."""

    variant: str
    overrides: dict[str, Any]


def configure(config: ConfigDict, entry: Entry, seed: int) -> ConfigDict:
    """Returns the config of one run.

    Raises:
        ValueError: a variant sets a key that there is not.
    """
    config = copy.deepcopy(config)
    config.variants = ()  # a run is the same in whichever study
    for key, value in entry.overrides.items():
        if key not in config:
            raise ValueError(
                f"variant {entry.variant!r} sets {key!r}, which is no key of a config."
            )
        config[key] = value
    config.seed += seed
    return config


def run(
    config: ConfigDict, variant: str, run_dir: pathlib.Path, data_dir: str | None
) -> report.Run:
    """Trains, or goes on, or reads what a finished run left in `run_dir`; one that
    diverges is a result as well."""
    try:
        summary = train(config, run_dir, data_dir)
    except NonFiniteError as error:
        print(f"{run_dir.name} diverged: {error}")
        keys = ("norm", "batch_size", "micro_batch_size", "learning_rate", "seed")
        summary = {key: config[key] for key in keys} | {"diverged": True}
    return report.Run({"variant": variant} | summary, wd.read_metrics(run_dir))
