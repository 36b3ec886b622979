"""The normaliser of a run, as its config describes it."""

from __future__ import annotations

from typing import Any

from configs import schema
from kalman_flax import NORMALIZERS, Normalization, normalization
from train.engine import plugins
from train.engine.mesh import DEVICES

#: attributes of a normaliser that its options cannot set, and what does
_SET_BY = {
    "momentum": "the key stats_momentum",
    "axis_name": "the key sync_statistics",
    "dtype": "the key dtype",
    "use_running_average": "training and inference",
    "name": "the network",
}


def make_normalization(config: Any) -> Normalization:
    """Looks up the normaliser that `config` names, and sets its options.

    Raises:
        ValueError: unknown normaliser or option, or one that another key sets.
    """
    options = options_of(config, "norm_options", _SET_BY)
    return normalization(
        config.norm,
        momentum=config.stats_momentum,
        axis_name=DEVICES if config.sync_statistics else None,
        known=plugins.known(config, "NORMALIZERS", NORMALIZERS),
        **options,
    )


def options_of(config: Any, key: str, set_by: dict[str, str]) -> dict[str, Any]:
    """Returns the nested options under `key`.

    Args:
        config: of the run.
        key: whose options.
        set_by: those that cannot be set there, and what sets them.

    Raises:
        ValueError: one of `set_by` is among them.
    """
    options = schema.plain(config[key])
    for option in sorted(options.keys() & set_by.keys()):
        raise ValueError(f"{key} sets {option}, which {set_by[option]} sets.")
    return options
