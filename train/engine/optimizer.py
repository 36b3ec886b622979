"""The optimiser that a config describes."""

from __future__ import annotations

import fnmatch
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from configs.schema import Key
from train.engine.normalizer import options_of

Links = list[optax.GradientTransformation]


def _sgd(rate: optax.Schedule, config: Any, **options: Any) -> Links:
    return [
        optax.add_decayed_weights(config.weight_decay, mask=kernels),
        optax.sgd(rate, momentum=config.sgd_momentum, **options),
    ]


def _adamw(rate: optax.Schedule, config: Any, **options: Any) -> Links:
    decay = config.weight_decay
    return [optax.adamw(rate, weight_decay=decay, mask=kernels, **options)]


def _lars(rate: optax.Schedule, config: Any, **options: Any) -> Links:
    return [
        optax.lars(
            rate,
            weight_decay=config.weight_decay,
            weight_decay_mask=kernels,
            trust_ratio_mask=kernels,
            momentum=config.sgd_momentum,
            **options,
        )
    ]


#: by name: its links, and the function of optax whose options it takes
OPTIMIZERS = {
    "sgd": (_sgd, optax.sgd),
    "adamw": (_adamw, optax.adamw),
    "lars": (_lars, optax.lars),
}
#: options that other keys set
_SET_BY = {
    "learning_rate": "the key learning_rate",
    "momentum": "the key sgd_momentum",
    "weight_decay": "the key weight_decay",
    "mask": "the engine: kernels alone decay",
    "weight_decay_mask": "the engine: kernels alone decay",
    "trust_ratio_mask": "the engine: kernels alone",
}
#: of options that are shares; the others are any number
_RANGES: dict[str, dict[str, Any]] = {
    "b1": {"least": 0, "below": 1},
    "b2": {"least": 0, "below": 1},
}


def check_optimizer(config: Any) -> dict[str, Any]:
    """Returns the options of the optimiser that `config` names.

    Raises:
        ValueError: one that there is not, and those there are are listed; or one that
            cannot be.
    """
    options = options_of(config, "optimizer_options", _SET_BY)
    _, function = OPTIMIZERS[config.optimizer]
    parameters = inspect.signature(function).parameters
    there = sorted(parameters.keys() - _SET_BY.keys())
    if unknown := sorted(options.keys() - set(there)):
        raise ValueError(
            f"optimizer {config.optimizer!r} has no option {unknown}; it has {there}."
        )
    for name, option in options.items():
        default = parameters[name].default
        if isinstance(default, bool | float):
            key = Key(default, "", **_RANGES.get(name, {}))
            key.check(f"optimizer_options.{name}", option)
    return options


def make_optimizer(
    config: Any, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Returns the optimiser that `config` names.

    Weight decay reaches kernels only, and is no part of the gradient that is clipped.
    Parameters that ``config.freeze`` names stay as they are.

    Args:
        config: of the run.
        schedule: the learning rate by step.
    """
    links_of, _ = OPTIMIZERS[config.optimizer]
    links = links_of(schedule, config, **check_optimizer(config))
    optimizer = optax.chain(*_clips(config), *links)
    if (
        not config.freeze
    ):  # no link that does nothing: checkpoints hold each one's state
        return optimizer
    return optax.multi_transform(
        {"train": optimizer, "freeze": optax.set_to_zero()},
        functools.partial(labels, patterns=config.freeze),
    )


def _clips(config: Any) -> Links:
    """Returns what shortens the gradient: none where nothing is clipped, since
    checkpoints hold the state of each link."""
    links: Links = []
    if config.clip_adaptive:
        adaptive = optax.adaptive_grad_clip(config.clip_adaptive)
        links.append(optax.masked(adaptive, _not_head))
    if config.clip_norm:
        links.append(optax.clip_by_global_norm(config.clip_norm))
    return links


def _not_head(params: Any) -> Any:
    """Returns of each parameter whether it is not the classifier's, which Brock et al.
    (2021, section 4.1) leave unclipped."""
    return _by_path(lambda path: not path.startswith("head/"), params)


def kernels(params: Any) -> Any:
    """Returns of each parameter whether it is a kernel."""
    return _by_path(lambda path: path.split("/")[-1] == "kernel", params)


def labels(params: Any, patterns: tuple[str, ...]) -> Any:
    """Returns ``"freeze"`` for each parameter whose path one of `patterns` matches,
    ``"train"`` for all others.

    Args:
        params: of the network.
        patterns: as of a shell, ``"stage1_*/conv1/kernel"``; ``*`` goes beyond ``/``.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    paths: list[str] = []
    _by_path(paths.append, params)
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise ValueError(
                f"freeze has {pattern!r}, which matches no parameter; they are called"
                f" {paths[0]} and so on, and lie in"
                f" {', '.join(dict.fromkeys(path.split('/')[0] for path in paths))}."
            )

    def label(path: str) -> str:
        matched = any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
        return "freeze" if matched else "train"

    return _by_path(label, params)


def _by_path(function: Callable[[str], Any], params: Any) -> Any:
    def of_leaf(path: Any, _: Any) -> Any:
        return function(jax.tree_util.keystr(path, simple=True, separator="/"))

    return jax.tree_util.tree_map_with_path(of_leaf, params)
