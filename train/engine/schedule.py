"""How long a run is, and its learning rate by step: by epochs, or by steps."""

from __future__ import annotations

from typing import Any

import optax

from configs.base import MOST_STEPS

#: keys that say the same in epochs and in steps; 0 or () where the other one says it
_EITHER = {
    "epochs": "total_steps",
    "warmup_epochs": "warmup_steps",
    "step_epochs": "step_drops",
}


def check_schedule(config: Any) -> None:
    """Refuses, with a ValueError, keys that do not go together."""
    for epochs, steps in _EITHER.items():
        if config[epochs] and config[steps]:
            raise ValueError(
                f"{epochs} {config[epochs]} and {steps} {config[steps]} are both given;"
                f" set the one that is not meant to {type(config[steps])()}."
            )
    if not config.epochs and not config.total_steps:
        raise ValueError("epochs and total_steps are 0; expected one of them to be 1.")
    for warmup, length in (
        ("warmup_epochs", "epochs"),
        ("warmup_steps", "total_steps"),
    ):
        if config[length] and config[warmup] >= config[length]:
            raise ValueError(
                f"{warmup} {config[warmup]} leaves none of {length} {config[length]}."
            )
    key = "step_drops" if config.step_drops else "step_epochs"
    at = config[key]
    if len(at) != len(config.step_factors):
        raise ValueError(
            f"{key} {at} and step_factors {config.step_factors} differ in length."
        )
    if sorted(set(at)) != list(at):
        raise ValueError(f"{key} is {at}; expected each later than the last.")


def count_steps(config: Any, steps_per_epoch: int) -> int:
    """Returns the updates of a run.

    Raises:
        ValueError: they are more than a run can have.
    """
    steps = config.total_steps or config.epochs * steps_per_epoch
    if steps > MOST_STEPS:
        raise ValueError(
            f"epochs {config.epochs} of {steps_per_epoch} updates are {steps:,} of"
            f" them; expected at most {MOST_STEPS:,}."
        )
    return steps


def make_schedule(config: Any, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then cosine or steps.

    Raises:
        ValueError: the warm-up takes all of the run.
    """
    warmup = config.warmup_steps or config.warmup_epochs * steps_per_epoch
    steps = count_steps(config, steps_per_epoch) - warmup
    if steps < 1:
        raise ValueError(
            f"the warm-up of {warmup} updates leaves none of {steps + warmup}."
        )
    rate = config.learning_rate
    if config.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(rate, steps)
    else:
        at = config.step_drops or [e * steps_per_epoch for e in config.step_epochs]
        drops = {step - warmup: f for step, f in zip(at, config.step_factors)}
        schedule = optax.piecewise_constant_schedule(rate, drops)
    if not warmup:
        return schedule
    # Of the way from `warmup_from` to 1, the first update is 1 / warmup there.
    first = rate * (config.warmup_from * (warmup - 1) + 1) / warmup
    rise = optax.linear_schedule(first, rate, max(1, warmup - 1))
    return optax.join_schedules([rise, schedule], [warmup])
