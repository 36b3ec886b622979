"""What the keys of a config may be together; `configs.base` says it of each."""

from __future__ import annotations

from typing import Any

from configs import base
from kalman_flax._filter.state import check_choice
from kalman_flax.baselines.flax_norms import FrozenBatchNorm
from kalman_flax.registry import DETECTORS, NETWORKS, SEGMENTERS
from train.engine import plugins
from train.engine.classification import Classification
from train.engine.detection import Detection
from train.engine.normalizer import make_normalization
from train.engine.optimizer import check_optimizer
from train.engine.profile import check_steps
from train.engine.schedule import check_schedule
from train.engine.segmentation import Segmentation
from train.engine.task import Task

#: those of the engine; plugins may have others
TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "detection": Detection,
}
#: by task
_NETWORKS = {
    "classification": NETWORKS,
    "segmentation": SEGMENTERS,
    "detection": DETECTORS,
}


def check(config: Any) -> int:
    """Returns the number of micro-batches in a step that run side by side.

    Raises:
        ValueError: a key that cannot be, by itself or beside others.
    """
    base.check(config)
    check_steps(config.profile_steps)
    check_schedule(config)
    check_optimizer(config)
    _check_frozen(config)
    task = task_of(config)
    if (config.classes or config.validation_examples) and task is not Classification:
        raise ValueError(
            "classes and validation_examples are for the task classification, not for"
            f" {config.task!r}; leave them out."
        )
    _check_network(config)
    task.check(config)
    return _side_by_side(config)


def _check_network(config: Any) -> None:
    """Refuses a network that is made for another task."""
    for task, networks in _NETWORKS.items():
        if config.network in networks and config.task in _NETWORKS.keys() - {task}:
            raise ValueError(
                f"network is {config.network!r}, which is for the task {task!r}; task"
                f" is {config.task!r}, whose networks are"
                f" {', '.join(_NETWORKS[config.task])}."
            )


def _check_frozen(config: Any) -> None:
    """Refuses frozen statistics that come from nowhere."""
    norm: Any = make_normalization(config).norm
    frozen = issubclass(getattr(norm, "func", norm), FrozenBatchNorm)
    if frozen and not config.init_from:
        raise ValueError(
            f"norm is {config.norm!r}, whose statistics are those of a checkpoint and"
            " never move: from scratch they stay 0 and 1, and it normalises nothing."
            " Train with the norm 'batch' first, and start from that run by"
            " --config.init_from=DIR."
        )


def task_of(config: Any) -> type[Task]:
    """Returns the class of the task that `config` names.

    Raises:
        ValueError: there is no such task.
    """
    tasks = plugins.known(config, "TASKS", TASKS)
    check_choice("task", config.task, tuple(tasks))
    return tasks[config.task]


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
