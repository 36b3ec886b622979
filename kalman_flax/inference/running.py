"""Running statistics of several replicas, each of which saw its own micro-batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from kalman_flax._filter.mixture import second_moment
from kalman_flax._filter.state import KalmanState


def merge_running(
    batch_stats: Any, momentum: float, axis_name: str | None = None
) -> Any:
    """Merges the `batch_stats` that R replicas wrote in one step, starting from one.

    Each replica r wrote ``momentum * old + (1 - momentum) * new_r``. The merged mean is
    that of the mean of the means; the merged variance that of the mean of the variances
    plus the variance of the means (law of total variance), as if one micro-batch had
    held the examples of all. With one replica nothing changes: it is `nn.BatchNorm`'s
    own update. The ``offset`` and ``ratio`` of `KalmanNorm.calibrate` are a mean and a
    variance of all that was observed, and merge by the same law. All else is averaged.

    Args:
        batch_stats: collection of ``mean`` and ``var``, with a leading axis ``R``.
        momentum: the one the normalisers decay their averages with, below 1.
        axis_name: mapped axis of devices, each with as many replicas, to merge over as
            well, in two all-reduces: the variances need the means.
    """
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum is {momentum}; expected a number in [0, 1).")

    def mean(stats: Any) -> Any:
        stats = jax.tree.map(lambda stat: jnp.mean(stat, axis=0), stats)
        if axis_name is None:
            return stats
        # The barrier has XLA reduce all of them at once, and not one layer after the
        # other, each as soon as it can.
        return lax.optimization_barrier(lax.pmean(stats, axis_name))

    flat: dict[Any, Any] = traverse_util.flatten_dict(batch_stats)
    # Of each variance its mean, and the share by which both hold what is new.
    of = {"var": ("mean", 1.0 - momentum), "ratio": ("offset", 1.0)}
    variances = {path: stat for path, stat in flat.items() if path[-1] in of}
    merged = mean({path: flat[path] for path in flat.keys() - variances.keys()})
    for path in variances:
        name, share = of[path[-1]]
        of_mean = (*path[:-1], name)
        state = KalmanState(flat[of_mean], variances[path])
        variances[path] = second_moment(state, merged[of_mean], share)
    return traverse_util.unflatten_dict(merged | mean(variances))
