"""The normaliser of a run, as its config describes it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from configs import schema
from kalman_flax import NORMALIZERS, Normalization, explain, normalization
from kalman_flax.layers.linear import RNG
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


def count_predicted(network: nn.Module, variables: Any, inputs: Any) -> dict[str, Any]:
    """Returns how many of the Kalman normalisers get a prediction, of how many, as
    ``{"predicted": [n, m]}``; nothing where there are none.

    Traces the network once, and compiles nothing.

    Args:
        network: called with `inputs` and `use_running_average`.
        variables: its collections; only shapes matter.
        inputs: of one example, a pytree of arrays ``[1, ...]``.
    """

    def forward(variables: Any, inputs: Any) -> Any:
        return network.apply(
            variables,
            inputs,
            use_running_average=False,
            mutable=True,
            rngs={RNG: jax.random.key(0)},
        )

    # Under a mapped axis, of one device, for synchronised statistics.
    on_devices = jax.vmap(forward, (None, 0), axis_name=DEVICES)
    # Two examples: one has no variance behind a global pool.
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, 2, *x.shape[1:]), x.dtype), inputs
    )
    rows = explain(on_devices, jax.eval_shape(lambda: variables), shapes).rows
    paths = {row.path: row.predicted for row in rows}
    return {"predicted": [sum(paths.values()), len(paths)]} if paths else {}


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
