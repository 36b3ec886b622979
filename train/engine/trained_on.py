"""What a run was trained on, kept in its directory and compared when it is used."""

from __future__ import annotations

import pathlib
from typing import Any

from absl import logging

from train.engine import processes
from train.engine import workdir as wd
from train.engine.experiment import Experiment
from train.engine.files import damaged, read_json
from train.engine.step import TrainState
from train.engine.task import Task

DATA = "data.json"


def last_state(workdir: pathlib.Path, experiment: Experiment) -> TrainState:
    """Returns the last checkpoint of a run, to be used on the data that it knows.

    Raises:
        ValueError: the data is not what the run was trained on.
        FileNotFoundError: there is no checkpoint.
    """
    check(workdir, experiment.task)
    return wd.last_checkpoint(workdir, experiment.state)


def check(workdir: pathlib.Path, task: Task, files: bool = False) -> dict[str, Any]:
    """Returns what to know the data of `task` by, see `Task.check_data`.

    Raises:
        ValueError: it is not what the run was trained on, or cannot be used.
    """
    kept = read(workdir)
    if kept is None and (workdir / wd.CHECKPOINTS).exists():
        logging.warning(
            "there is no %s in %s: nothing says whether the run was trained on the data"
            " that is there now",
            DATA,
            workdir,
        )
    return task.check_data(kept, files)


def keep(workdir: pathlib.Path, found: dict[str, Any]) -> None:
    """Writes what `check` returned."""
    if processes.primary():
        wd.write_json(workdir / DATA, found)


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns what `keep` wrote; None if there is nothing.

    Raises:
        ValueError: it is damaged.
    """
    path = workdir / DATA
    if not path.exists():
        return None
    mend = "delete it to go on with the data that is there now"
    kept = read_json(path, mend)
    if not all(isinstance(part, dict) for part in kept.values()):
        raise damaged(path, mend)
    return kept
