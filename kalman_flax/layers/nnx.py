"""Kalman Normalization as a module of Flax NNX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kalman_flax.layers.kalman_norm import KalmanNorm as LinenKalmanNorm
from kalman_flax.layers.signal import Signal


class KalmanNorm(nnx.Module):
    """`kalman_flax.KalmanNorm` as an NNX module.

    Parameters are `nnx.Param`, running statistics `nnx.BatchStat`, by the names of
    the linen module, which does the work. It gets its prediction with a Signal, or in
    `kalman_flax.filtered`.

    Args:
        num_features: channels.
        use_running_average: as in `flax.nnx.BatchNorm`; ``train()`` and ``eval()`` of
            the model set it.
        rngs: key of the parameters.
        **options: attributes of `kalman_flax.KalmanNorm`, e.g. ``momentum``, ``gain``.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.linen = LinenKalmanNorm(**options, parent=None)
        axis = self.linen.axis
        shape = [1] * (axis + 1 if axis >= 0 else max(2, -axis))
        shape[axis] = num_features
        variables = self.linen.init(rngs.params(), jnp.zeros(shape), False)
        self.names = {name: tuple(tree) for name, tree in variables.items()}
        kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
        for collection, tree in variables.items():
            for name, value in tree.items():
                setattr(self, name, kinds[collection](value))

    @property
    def variables(self) -> dict[str, dict[str, jax.Array]]:
        """The variables of the linen module."""
        return {
            collection: {name: getattr(self, name)[...] for name in names}
            for collection, names in self.names.items()
        }

    def __call__(
        self,
        x: Signal | jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Signal | jax.Array:
        """Filters and normalises ``[N, ..., C]``, as the linen module does."""
        if use_running_average is None:
            use_running_average = self.use_running_average
        y, updates = self.linen.apply(
            self.variables, x, use_running_average, mask=mask, mutable=["batch_stats"]
        )
        for name, value in updates["batch_stats"].items():
            getattr(self, name)[...] = value
        return y
