"""What the keys of a config may be, each and together."""

from __future__ import annotations

import difflib
from typing import Any

from configs import base
from kalman_flax._filter.state import check_choice
from train.engine import plugins
from train.engine.classification import Classification
from train.engine.normalizer import make_normalization
from train.engine.optimizer import OPTIMIZERS, check_optimizer
from train.engine.profile import check_steps
from train.engine.schedule import check_schedule
from train.engine.task import Task

#: those of the engine; plugins may have others
TASKS: dict[str, type[Task]] = {"classification": Classification}

#: the least that they may be
_AT_LEAST = {
    "batch_size": 1,
    "micro_batch_size": 1,
    "accumulate": 1,
    "eval_batch_size": 1,
    "log_steps": 1,
    "eval_epochs": 1,
    "checkpoint_epochs": 1,
    "blocks_per_stage": 1,
    "image_size": 1,
    "epochs": 0,
    "total_steps": 0,
    "max_pixels": 1,
    "width": 0,
    "train_examples": 0,
    "test_examples": 0,
    "crop_padding": 0,
    "data_workers": 0,
    "warmup_epochs": 0,
    "warmup_steps": 0,
    "warmup_from": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "clip_norm": 0,
    "seed": 0,
}
_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "schedule": ("cosine", "step"),
    "optimizer": tuple(OPTIMIZERS),
}


def check(config: Any) -> int:
    """Returns the number of micro-batches in a step that run side by side.

    Raises:
        ValueError: a key that cannot be, by itself or beside others.
    """
    _check_keys(config)
    for key, least in _AT_LEAST.items():
        if not config[key] >= least:
            raise ValueError(f"{key} is {config[key]}; expected at least {least}.")
    if config.seed >= 2**32:
        raise ValueError(f"seed is {config.seed}; expected less than 2^32.")
    for key, choices in _CHOICES.items():
        check_choice(key, config[key], choices)
    check_steps(config.profile_steps)
    check_schedule(config)
    check_optimizer(config)
    make_normalization(config)
    task_of(config).check(config)
    return _side_by_side(config)


def task_of(config: Any) -> type[Task]:
    """Returns the class of the task that `config` names.

    Raises:
        ValueError: there is no such task.
    """
    tasks = plugins.known(config, "TASKS", TASKS)
    check_choice("task", config.task, tuple(tasks))
    return tasks[config.task]


def _check_keys(config: Any) -> None:
    """The command line would take any key, for those of nested options are not known
    beforehand."""
    keys = set(base.get_config())
    for key in sorted(set(config) - keys):
        close = difflib.get_close_matches(key, keys, 1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        raise ValueError(f"a config has no key {key!r}.{hint}")


def _side_by_side(config: Any) -> int:
    size, part = config.micro_batch_size, config.micro_batch_size * config.accumulate
    if config.batch_size % size:
        raise ValueError(
            f"micro_batch_size {size} does not divide batch_size {config.batch_size}."
        )
    if config.batch_size % part:
        raise ValueError(
            f"the {config.batch_size // size} micro-batches of a step (batch_size"
            f" {config.batch_size}, micro_batch_size {size}) do not split into"
            f" accumulate = {config.accumulate} equal parts."
        )
    return config.batch_size // part
