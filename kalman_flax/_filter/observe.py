"""Moments of a micro-batch over a set S_i of its values (paper, Eq. 1 and 8)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kalman_flax._filter.state import KalmanState, check_choice
from kalman_flax._kernels import hold

SETS = ("batch", "group", "layer", "instance")


def observe(
    x: jax.Array,
    over: str = "batch",
    *,
    num_groups: int | None = None,
    axis: int = -1,
    mask: jax.Array | None = None,
    axis_name: str | None = None,
    guess: jax.Array | None = None,
) -> KalmanState:
    """Mean and biased variance of `x` over the set that each value belongs to.

    Two centred passes in float32: the one-pass form E[x^2] - E[x]^2 gives 0 for
    data at 1e4 +- 1. With a guess of the mean, on a GPU or TPU, one pass about that.

    Args:
        x: ``[N, ..., C]`` activation of any floating dtype, channels at `axis`.
        over: the set S_i. ``"batch"``: all values of a channel. ``"group"``: the
            values of one example in a group of channels. ``"layer"``: all values
            of one example. ``"instance"``: one channel of one example.
        num_groups: G, for ``"group"`` only.
        axis: the channel axis.
        mask: broadcastable to `x`; values where it is false do not count. A set
            that is masked out entirely has mean 0 and variance 0.
        axis_name: mapped axis to share the statistics over, weighted by counts.
        guess: for ``"batch"``, ``[C]``, what the means will be, more or less. The
            rounding error of the variance grows by (mean - guess)^2. Not used with a
            mask or an axis.

    Returns:
        float32 state: ``[C]`` for ``"batch"``, ``[N, C]`` otherwise, where each
        channel carries the moments of its set.

    Raises:
        ValueError: unknown set, or a group count that does not divide C.
    """
    check_choice("over", over, SETS)
    if mask is not None:
        mask = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)
        mask = jnp.moveaxis(mask, axis, -1)
    x = jnp.moveaxis(jnp.asarray(x, jnp.float32), axis, -1)
    if over == "batch":
        return _moments(x, tuple(range(x.ndim - 1)), mask, axis_name, guess)

    channels = x.shape[-1]
    groups = {"group": num_groups, "layer": 1, "instance": channels}[over]
    if groups is None or groups < 1 or channels % groups:
        raise ValueError(
            f"num_groups is {groups}, but the activation has {channels} channels;"
            " choose a divisor of the channel count."
        )
    split = (*x.shape[:-1], groups, channels // groups)
    axes = (*range(1, x.ndim - 1), x.ndim)  # all but the example and the group
    mask = None if mask is None else mask.reshape(split)
    state = _moments(x.reshape(split), axes, mask, axis_name)
    return KalmanState(*(jnp.repeat(s, channels // groups, axis=-1) for s in state))


def _moments(
    x: jax.Array,
    axes: tuple[int, ...],
    mask: jax.Array | None,
    axis_name: str | None,
    guess: jax.Array | None = None,
) -> KalmanState:
    if mask is None and axis_name is None:
        return KalmanState(*_mean_and_variance(x, guess, axes))

    def total(values: jax.Array) -> jax.Array:
        result = jnp.sum(values, axes, where=mask, keepdims=True)
        return result if axis_name is None else lax.psum(result, axis_name)

    count = jnp.maximum(total(jnp.ones_like(x)), 1.0)
    mean = total(x) / count
    # Where the mask is false x may be NaN, and so may the gradient of its square.
    centred = x - mean if mask is None else jnp.where(mask, x - mean, 0.0)
    var = total(jnp.square(centred)) / count
    return KalmanState(jnp.squeeze(mean, axes), jnp.squeeze(var, axes))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _mean_and_variance(
    x: jax.Array, guess: jax.Array | None, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    if guess is None:
        return _two_passes(x, axes)
    # XLA:CPU takes as long for two sums in one pass as in two.
    return lax.platform_dependent(
        x,
        guess,
        cpu=lambda x, _: _two_passes(x, axes),
        default=functools.partial(_one_pass, axes=axes),
    )


def _two_passes(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    return jnp.mean(x, axes), jnp.var(x, axes)


def _one_pass(
    x: jax.Array, guess: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """mean = c + E[x - c], var = E[(x - c)^2] - E[x - c]^2, c = `guess`: known before
    `x` is, so that the convolution that computes `x` can sum up both on the way."""
    away = x - jnp.expand_dims(guess, axes)
    mean = jnp.mean(away, axes)
    square = jnp.mean(jnp.square(away), axes)
    return guess + mean, jnp.maximum(square - jnp.square(mean), 0.0)


@_mean_and_variance.defjvp
def _mean_and_variance_jvp(
    axes: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[Any, Any]:
    """d mean = E[dx]; d var = 2 E[(x - mean) dx], for E[(x - mean) d mean] is 0: one
    sum over the positions less in the backward pass."""
    (x, guess), (d_x, _) = primals, tangents  # the guess makes no difference
    mean, var = _mean_and_variance(x, guess, axes)
    # Has XLA:CPU subtract again: it would keep x - mean in memory, beside x.
    centred = x - jnp.expand_dims(hold(mean), axes)
    return (mean, var), (jnp.mean(d_x, axes), 2.0 * jnp.mean(centred * d_x, axes))
