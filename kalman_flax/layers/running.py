"""Running statistics of several replicas, each of which saw its own micro-batch."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import traverse_util


def merge_running(batch_stats: Any, momentum: float) -> Any:
    """Merges the `batch_stats` that R replicas wrote in one step, starting from one.

    Each replica r wrote ``momentum * old + (1 - momentum) * new_r``. The merged mean is
    that of the mean of the means; the merged variance that of the mean of the variances
    plus the variance of the means (law of total variance), as if one micro-batch had
    held the examples of all. With one replica nothing changes: it is `nn.BatchNorm`'s
    own update.

    Args:
        batch_stats: collection of ``mean`` and ``var``, with a leading axis ``R``.
        momentum: the one the normalisers decay their averages with, below 1.
    """
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum is {momentum}; expected a number in [0, 1).")
    flat = traverse_util.flatten_dict(batch_stats)
    merged = {path: jnp.mean(stat, axis=0) for path, stat in flat.items()}
    for path in merged:
        if path[-1] == "var":
            # Var over r of the averages is (1 - momentum)^2 that of the means, but is
            # to count (1 - momentum) times.
            spread = jnp.var(flat[(*path[:-1], "mean")], axis=0)
            merged[path] += spread / (1.0 - momentum)
    return traverse_util.unflatten_dict(merged)
