"""The law of total variance, by which moments of parts make those of the whole."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from kalman_flax._filter.state import KalmanState


def second_moment(
    state: KalmanState, centre: Float[Array, "*#parts"] | float, share: float = 1.0
) -> Float[Array, "*parts"]:
    """E[(x - centre)^2] = var + (mean - centre)^2 of every part.

    Its average over the parts of a whole, about the average of their means, is the
    variance of the whole: the mean of the variances plus the variance of the means.

    Args:
        state: moments of the parts, of any shape.
        centre: broadcastable to it.
        share: where means and variances are averages that hold what counts by this
            share: so is the square of the difference to.
    """
    return state.var + jnp.square(state.mean - centre) / share


def predict_mixture(
    states: Sequence[KalmanState], shares: Sequence[Float[Array, "*#parts"] | float]
) -> KalmanState:
    """State of values that are from each of `states` by its share: means of the means,
    and of the variances with that of the means. Exact; shares sum to 1."""
    mean = sum(share * s.mean for s, share in zip(states, shares))
    var = sum(share * second_moment(s, mean) for s, share in zip(states, shares))
    return KalmanState(mean, var)


def merged(states: KalmanState) -> KalmanState:
    """The same for equal shares, along the leading axis of ``[R, ..., C]``."""
    mean = jnp.mean(states.mean, axis=0)
    return KalmanState(mean, jnp.mean(second_moment(states, mean), axis=0))
