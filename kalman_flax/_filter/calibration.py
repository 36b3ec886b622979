"""A filter on the filter's own error: what past observations say of a prediction."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kalman_flax._filter.mixture import merged
from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import update

Corrected = Literal["var", "both"]

#: E, added to predicted variances, which may be 0
FLOOR = 1e-6


class Correction(NamedTuple):
    """How far a layer's observations lay from its predictions, channel by channel, in
    units of what was predicted: s^2 = Sigma_pred + E, E = 1e-6.

    Attributes:
        offset: d ``[C]``, running mean of (x - mu_pred) / s.
        ratio: e ``[C]``, running variance of it.
        weight: n ``[C]``, the share that observations have in both: from 0, where none
            was made and they are 0 and 1, to 1.
    """

    offset: Float[Array, "*batch C"]
    ratio: Float[Array, "*batch C"]
    weight: Float[Array, "*batch C"]


def uncorrected(channels: int) -> Correction:
    """The correction that changes nothing, before the first observation."""
    zeros = jnp.zeros((channels,), jnp.float32)
    return Correction(zeros, zeros + 1.0, zeros)


def correct(
    predicted: KalmanState, correction: Correction, what: Corrected = "both"
) -> KalmanState:
    """Corrects a prediction by what was observed before.

        mean = mu_pred + d s,  var = e s^2,  s^2 = Sigma_pred + E

    Gradients flow through the prediction, and not through d and e.

    Args:
        predicted: ``[..., C]``.
        correction: ``[C]``.
        what: ``"both"``, or ``"var"``, which leaves the mean as it was predicted.
    """
    offset, ratio, _ = lax.stop_gradient(correction)
    square = predicted.var + FLOOR
    mean = predicted.mean
    if what == "both":
        mean = mean + offset * jnp.sqrt(square)
    return KalmanState(mean, ratio * square)


def update_correction(
    correction: Correction,
    predicted: KalmanState,
    observed: KalmanState,
    momentum: float,
) -> Correction:
    """Learns from one more observation how predictions are to be corrected.

        n' = k n + 1 - k,  a = (1 - k) / n'
        d' = (1 - a) d + a z,                           z = (x_bar - mu_pred) / s
        e' = (1 - a) e + a S / s^2 + a (1 - a) (z - d)^2

    This is `update` by the rule "mixture", in units of the prediction, with a gain that
    falls from 1 to 1 - k: d and e are the exact mean and variance of all that was
    observed, weighed by k to the power of its age, from the first observation on. The
    idea is that of innovation-based adaptive filters (Mehra, 1970, "On the
    identification of variances and adaptive Kalman filtering"; Sage and Husa, 1969).
    Nothing has a gradient.

    Args:
        correction: of all observations before this one.
        predicted: ``[..., C]``, as it was before any correction.
        observed: ``[..., C]``, x_bar and S of the micro-batch.
        momentum: k in [0, 1]. With 0 this observation alone counts: what is corrected
            is then what was observed.

    Returns:
        The next correction. Those of replicas are averaged by `merged_corrections`.
    """
    predicted, observed = lax.stop_gradient((predicted, observed))
    offset, ratio, weight = lax.stop_gradient(correction)
    square = predicted.var + FLOOR
    seen = KalmanState(
        (observed.mean - predicted.mean) / jnp.sqrt(square), observed.var / square
    )
    weight = momentum * weight + (1.0 - momentum)
    gain = (1.0 - momentum) / jnp.maximum(weight, 1e-30)  # of k = 1 it is 0
    moved = update(KalmanState(offset, ratio), seen, gain, rule="mixture")
    weight = jnp.broadcast_to(weight, moved.mean.shape)
    return Correction(moved.mean, moved.var, weight)


def merged_corrections(corrections: Correction) -> Correction:
    """What replicas learned in one step from one correction, ``[R, ..., C]``, as if one
    had observed it all."""
    offset, ratio = merged(KalmanState(corrections.offset, corrections.ratio))
    return Correction(offset, ratio, jnp.mean(corrections.weight, axis=0))
