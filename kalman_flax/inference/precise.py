"""Precise statistics: running moments recomputed with the weights as they now are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import update
from kalman_flax.inference.running import merge_running


def running_moments(batch_stats: Any) -> dict[tuple[str, ...], KalmanState]:
    """Returns the pairs ``mean`` and ``var`` in `batch_stats`, by the layer's path."""
    flat: dict[Any, Any] = traverse_util.flatten_dict(batch_stats)
    return {
        path[:-1]: KalmanState(mean, flat[*path[:-1], "var"])
        for path, mean in flat.items()
        if path[-1] == "mean" and (*path[:-1], "var") in flat
    }


def precise_statistics(
    forward: Callable[[Any], Any],
    batch_stats: Any,
    batches: Iterable[Any],
    momentum: float,
) -> Any:
    """Recomputes every running mean and variance from training batches ("precise batch
    norm", Wu and Johnson, 2021, "Rethinking 'Batch' in BatchNorm"; fvcore's
    `precise_bn.py`). A moving average mixes the statistics of many past weights and,
    over few steps, of few examples; this is the population's, of the last weights,

        mean = E[mean_r],  var = E[var_r] + Var[mean_r],

    over the replicas r of all batches: exactly the moments of all their values in the
    first normaliser, and in later ones of what they see in training, where each replica
    normalises by itself. Costs a forward pass a batch, once, after training; 1,000 to
    10,000 examples are enough. For any normaliser of running ``mean`` and ``var``; its
    training pass may use them. Those of a Kalman filter are the filtered moments.

    Args:
        forward: maps a batch to the `batch_stats` that its replicas write in a training
            pass that starts from `batch_stats`, with a leading axis of replicas, all of
            one size: a vmapped `apply`. Jit it.
        batch_stats: the collection of the trained network.
        batches: what `forward` takes, one after another.
        momentum: the normalisers', below 1. Undoing their averages rounds at
            1e-7 / (1 - momentum) of what is largest, the old value or the new one; a
            network built anew with momentum 0 is exact.

    Returns:
        `batch_stats` in which all pairs ``mean`` and ``var`` are new, and nothing else.

    Raises:
        ValueError: no such pair, no batch, or momentum 1.
    """
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum is {momentum}; expected a number in [0, 1).")
    old = running_moments(batch_stats)
    if not old:
        raise ValueError(
            "batch_stats hold no running mean and var; precise statistics are for"
            " normalisers that keep both, such as BatchNorm and KalmanNorm."
        )

    def observed(written: jax.Array, old: jax.Array) -> jax.Array:
        return (written - momentum * old) / (1.0 - momentum)

    new: dict[tuple[str, ...], KalmanState] = {}
    count = 0
    for batch in batches:
        written = running_moments(forward(batch))
        replicas = len(jax.tree.leaves(written)[0])
        count += replicas
        for layer in old:
            state = jax.tree.map(observed, written[layer], old[layer])
            state = KalmanState(**merge_running(state._asdict(), momentum=0.0))
            # The mixture of all replicas before and those of this batch.
            new[layer] = update(new.get(layer, state), state, gain=replicas / count)
    if not count:
        raise ValueError("no batches; precise statistics need at least one.")

    flat: dict[Any, Any] = traverse_util.flatten_dict(batch_stats)
    for layer, (mean, var) in new.items():
        flat[*layer, "mean"], flat[*layer, "var"] = mean, jnp.maximum(var, 0.0)
    return traverse_util.unflatten_dict(flat)
