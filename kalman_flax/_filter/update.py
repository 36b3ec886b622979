"""The Kalman update and what follows it (paper, Eq. 6 and 7): update, normalize."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kalman_flax._filter.predict import predict_affine
from kalman_flax._filter.state import KalmanState, check_choice
from kalman_flax._kernels import hold

RULES = ("mixture", "paper")


def update(
    predicted: KalmanState,
    observed: KalmanState,
    gain: jax.Array | float,
    rule: str = "mixture",
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
        gain: q in [0, 1], the weight of the observation; scalar or ``[C]``.
        rule: ``"mixture"`` or ``"paper"``.
    """
    check_choice("rule", rule, RULES)
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
    return jax.tree.map(
        lambda kept, fallback: jnp.where(ratio < limit, kept, fallback),
        predicted,
        observed,
    )


def normalize(
    x: jax.Array,
    state: KalmanState,
    scale: jax.Array | float = 1.0,
    bias: jax.Array | float = 0.0,
    *,
    epsilon: float = 1e-5,
    axis: int = -1,
) -> jax.Array:
    """y = scale (x - mean) / sqrt(var + epsilon) + bias, in float32 or wider.

    Args:
        x: ``[N, ..., C]`` with the channels at `axis`.
        state: ``[C]``, or ``[N, C]`` for statistics of each example.
        scale, bias: gamma and beta, ``[C]`` or scalar.
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
    mean, var = (jnp.asarray(stat, jnp.float32) for stat in state)
    slope = lax.rsqrt(var + epsilon) * scale
    return _affine(x, expand(mean), expand(slope), expand(bias))


@jax.custom_jvp
def _affine(
    x: jax.Array, centre: jax.Array, slope: jax.Array, offset: jax.Array
) -> jax.Array:
    return (x - centre) * slope + offset


@_affine.defjvp
def _affine_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The product rule, with what is the same at all positions summed up first: in the
    backward pass two sums over the positions give all gradients."""
    x, centre, slope, _ = primals
    d_x, d_centre, d_slope, d_offset = tangents
    # Has XLA:CPU subtract again, as in `observe`, and take the one sum over the
    # positions for both gradients that it gives.
    everywhere = hold(d_offset - slope * d_centre)
    centred = x - hold(centre)
    return _affine(*primals), slope * d_x + centred * d_slope + everywhere


def normalized_state(
    scale: jax.Array | float = 1.0, bias: jax.Array | float = 0.0
) -> KalmanState:
    """Moments of what `normalize` puts out: mean bias, variance scale^2.

    The factor var / (var + epsilon) is left out, which is 1 to the fifth digit where
    var is 1. So the state follows from the parameters alone: it is the same for all
    micro-batches of a step, and `jax.vmap` over them predicts it onwards once.

    Args:
        scale, bias: gamma and beta, ``[C]`` or scalar.
    """
    return predict_affine(KalmanState(0.0, 1.0), scale, bias)
