"""What the keys of a config may be, each and together."""

from __future__ import annotations

import json
from typing import Any

from kalman_flax import NETWORKS, NORMALIZERS, Normalization, normalization
from kalman_flax._filter.state import check_choice
from train.data.batches import STANDARDIZE
from train.engine.mesh import DEVICES
from train.engine.profile import check_steps
from train.studies.controls import CONTROLS

#: the least that they may be
_AT_LEAST = {
    "batch_size": 1,
    "micro_batch_size": 1,
    "accumulate": 1,
    "eval_batch_size": 1,
    "epochs": 1,
    "log_steps": 1,
    "eval_epochs": 1,
    "checkpoint_epochs": 1,
    "blocks_per_stage": 1,
    "width": 1,
    "image_size": 1,
    "max_pixels": 1,
    "train_examples": 0,
    "test_examples": 0,
    "crop_padding": 0,
    "data_workers": 0,
    "warmup_epochs": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "clip_norm": 0,
    "seed": 0,
}
_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "network": tuple(NETWORKS),
    "schedule": ("cosine", "step"),
    "standardize": STANDARDIZE,
}
#: attributes of a normaliser that its options cannot set, and what does
_SET_BY = {
    "momentum": "the key stats_momentum",
    "axis_name": "the key sync_statistics",
    "dtype": "the key dtype",
    "use_running_average": "training and inference",
    "name": "the network",
}


def check(config: Any) -> int:
    """Returns the number of micro-batches in a step that run side by side.

    Raises:
        ValueError: a key that cannot be, by itself or beside others.
    """
    for key, least in _AT_LEAST.items():
        if not config[key] >= least:
            raise ValueError(f"{key} is {config[key]}; expected at least {least}.")
    for key, choices in _CHOICES.items():
        check_choice(key, config[key], choices)
    check_steps(config.profile_steps)
    _check_schedule(config)
    make_normalization(config)
    return _side_by_side(config)


def _check_schedule(config: Any) -> None:
    if config.warmup_epochs >= config.epochs:
        raise ValueError(
            f"warmup_epochs {config.warmup_epochs} leaves none of epochs"
            f" {config.epochs}."
        )
    at = config.step_epochs
    if len(at) != len(config.step_factors):
        raise ValueError(
            f"step_epochs {at} and step_factors {config.step_factors} differ in length."
        )
    if sorted(set(at)) != list(at):
        raise ValueError(f"step_epochs is {at}; expected each later than the last.")


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


def make_normalization(config: Any) -> Normalization:
    """Looks up the normaliser that `config` names, and sets its options."""
    try:
        options = json.loads(config.norm_options)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"norm_options is {config.norm_options!r}, which is not JSON ({error});"
            ' expected an object such as {"gain": 0.5, "learn_gain": null}.'
        ) from error
    if not isinstance(options, dict):
        raise ValueError(f"norm_options is {config.norm_options}; expected an object.")
    for option in options.keys() & _SET_BY.keys():
        raise ValueError(f"norm_options sets {option}, which {_SET_BY[option]} sets.")
    return normalization(
        config.norm,
        momentum=config.stats_momentum,
        axis_name=DEVICES if config.sync_statistics else None,
        known=NORMALIZERS | CONTROLS,
        **options,
    )
