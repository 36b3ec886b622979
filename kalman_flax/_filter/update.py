"""The Kalman update and what follows it (paper, Eq. 6 and 7): update, normalize."""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from kalman_flax._filter.mixture import second_moment
from kalman_flax._filter.predict import predict_affine
from kalman_flax._filter.state import KalmanState, OfChannels, check_choice
from kalman_flax._kernels import centre_and_scale

Rule = Literal["mixture", "paper"]


def update(
    predicted: KalmanState,
    observed: KalmanState,
    gain: OfChannels,
    rule: Rule = "mixture",
) -> KalmanState:
    """Combines what was predicted with what was observed; q = `gain`, p = 1 - q.

        mean = p mu_pred + q x_bar                                    Eq. 6
        var  = p Sigma_pred + q S                                     "paper", Eq. 7
        var  = p Sigma_pred + q S + p q (x_bar - mu_pred)^2           "mixture"

    "mixture" is the exact variance of the mixture of both distributions, and what the
    authors' released code does. q = 1 is batch normalisation, q = 0 normalisation
    propagation (from the weights alone).

    Args:
        predicted, observed: ``[..., C]``, broadcast against each other.
        gain: q in [0, 1], the weight of the observation.
        rule: ``"mixture"`` or ``"paper"``.
    """
    check_choice("rule", rule, get_args(Rule))
    q, p = gain, 1.0 - gain
    mean = p * predicted.mean + q * observed.mean
    var = p * predicted.var + q * observed.var
    if rule == "mixture":
        var += p * q * jnp.square(observed.mean - predicted.mean)
    return KalmanState(mean, var)


def reject_outlier(
    predicted: KalmanState, observed: KalmanState, limit: float
) -> KalmanState:
    """The guard of the released code: drops predictions of a wildly wrong scale.

    Returns `predicted` where the channels' mean of Sigma_pred / S is below `limit`
    (100 in the released code), and `observed` in its place elsewhere, with which the
    update of either rule gives the observation alone.
    """
    ratio = jnp.mean(predicted.var / observed.var, axis=-1, keepdims=True)
    return choose(ratio < limit, predicted, observed)


def is_known(predicted: KalmanState) -> Bool[Array, "*batch C"]:
    """Where a prediction says something: its second moment is neither infinite nor NaN.

    Its square enters the update by the rule "mixture".
    """
    return jnp.isfinite(second_moment(predicted, 0.0))


def choose(
    condition: Bool[Array, "*#batch_and_C"], one: KalmanState, other: KalmanState
) -> KalmanState:
    """`one` where the condition holds, `other` elsewhere; broadcast."""
    return KalmanState(*(jnp.where(condition, *stats) for stats in zip(one, other)))


def normalize(
    x: Num[Array, "*N_map_and_C"],
    state: KalmanState,
    scale: OfChannels = 1.0,
    bias: OfChannels = 0.0,
    *,
    epsilon: float = 1e-5,
    axis: int = -1,
) -> Float[Array, "*N_map_and_C"]:
    """y = scale (x - mean) / sqrt(var + epsilon) + bias, in float32 or wider.

    Args:
        x: ``[N, ..., C]`` with the channels at `axis`.
        state: ``[C]``, or ``[N, C]`` for statistics of each example.
        scale, bias: gamma and beta.
        epsilon: added to the variance.
        axis: the channel axis.
    """

    def expand(stat: jax.Array | float) -> jax.Array:
        stat = jnp.asarray(stat)
        if stat.ndim == 0:
            return stat
        spatial = (1,) * (x.ndim - stat.ndim)
        stat = stat.reshape(*stat.shape[:-1], *spatial, stat.shape[-1])
        return jnp.moveaxis(stat, -1, axis)

    if not jnp.issubdtype(x.dtype, jnp.floating):  # of which nothing has a derivative
        x = x.astype(jnp.float32)
    mean, var = (
        jnp.asarray(stat, jnp.result_type(stat, jnp.float32)) for stat in state
    )
    slope = lax.rsqrt(var + epsilon) * scale
    return centre_and_scale(x, expand(mean), expand(slope), expand(bias))


def normalized_state(scale: OfChannels = 1.0, bias: OfChannels = 0.0) -> KalmanState:
    """Moments of what `normalize` puts out: mean bias, variance scale^2.

    The factor var / (var + epsilon) is left out, which is 1 to the fifth digit where
    var is 1. So the state follows from the parameters alone: it is the same for all
    micro-batches of a step, and `jax.vmap` over them predicts it onwards once.

    Args:
        scale, bias: gamma and beta.
    """
    return predict_affine(KalmanState(0.0, 1.0), scale, bias)
