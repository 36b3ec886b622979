"""Closed-form predictions: one function per operation, state in, state out.

Each moves the mean and variance of an operation's input to those of its output
(paper, Eq. 5 and the first and third line of Eq. 7). Convolution and averages over
positions have files of their own, `convolution.py` and `pool.py`. Max-pooling has no
good closed form: `observe` its output.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from kalman_flax._filter.state import (
    KalmanState,
    OfChannels,
    aligned,
    for_channels,
    standard_deviation,
    wide,
)


def predict_dense(
    state: KalmanState,
    kernel: Float[Array, "C D"],
    bias: Float[Array, " D"] | float = 0.0,
) -> KalmanState:
    """Moves a state ``[..., C]`` through ``x @ kernel + bias``.

    mean = mu W + b, variance = v W^2; exact for independent inputs.
    """
    kernel = wide(kernel)
    mean, var = for_channels(state, kernel.shape[0])
    matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    mean, var = matmul(mean, kernel), matmul(var, jnp.square(kernel))
    return KalmanState(sum(aligned(mean, bias)), var)


def predict_affine(
    state: KalmanState, scale: OfChannels, bias: OfChannels
) -> KalmanState:
    """Moves a state through ``scale * x + bias``. Exact."""
    mean, var, scale, bias = aligned(*state, scale, bias)
    return KalmanState(scale * mean + bias, jnp.square(scale) * var)


def predict_relu(state: KalmanState) -> KalmanState:
    """Moves a Gaussian state ``[..., C]`` through ``max(x, 0)``.

    With a = mu / s, s^2 = v (Frey and Hinton, 1999):

        mean = mu Phi(a) + s phi(a)
        var  = s^2 [(1 + a^2) Phi + a phi - (a Phi + phi)^2]

    written as s^2 [Phi + a^2 Phi (1 - Phi) + a phi (1 - 2 Phi) - phi^2], whose terms
    vanish one by one as \\|a\\| grows instead of cancelling. Values and gradients are
    finite at v = 0.
    """
    mean, var = (wide(stat) for stat in state)
    return KalmanState(*_rectify(mean, var))


@jax.custom_jvp
def _rectify(mean: jax.Array, var: jax.Array) -> tuple[jax.Array, jax.Array]:
    std, a, above, density = _gaussian(mean, var)
    below = 1.0 - above
    out_var = (
        above
        + jnp.square(a) * above * below
        + a * density * (below - above)
        - jnp.square(density)
    )
    return mean * above + std * density, jnp.square(std) * jnp.maximum(out_var, 0.0)


@_rectify.defjvp
def _rectify_jvp(primals: Any, tangents: Any) -> Any:
    """By Price's theorem dE[f] = E[f'] dmu + E[f''] dv / 2, for f = max(x, 0) and its
    square: a few operations, where differentiating the formulas takes dozens."""
    (mean, var), (d_mean, d_var) = primals, tangents
    out_mean, out_var = _rectify(mean, var)
    std, _, above, density = _gaussian(mean, var)
    slope = density / std
    return (out_mean, out_var), (
        above * d_mean + 0.5 * slope * d_var,
        2.0 * out_mean * (1.0 - above) * d_mean + (above - out_mean * slope) * d_var,
    )


def _gaussian(
    mean: jax.Array, var: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns s, a = mu / s, Phi(a) and phi(a)."""
    std = standard_deviation(var)
    a = mean / std
    # By `erf`: `ndtr` is more accurate in the tails, for many more operations; what is
    # lost here is of the order of 1e-6 of the input's variance.
    above = 0.5 * (1.0 + lax.erf(a * math.sqrt(0.5)))
    return std, a, above, jnp.exp(-0.5 * jnp.square(a)) / math.sqrt(2 * math.pi)


def predict_pointwise(
    state: KalmanState, fn: Callable[[jax.Array], jax.Array], order: int = 32
) -> KalmanState:
    """Moves a Gaussian state ``[..., C]`` through any pointwise `fn`.

    Gauss-Hermite quadrature of the first two moments: exact for polynomials up to
    degree ``order - 1``, to three digits for tanh or gelu at variances up to 2, to
    two at a kink.

    Args:
        state: ``[..., C]``.
        fn: elementwise function of an array.
        order: number of quadrature nodes.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    weights = weights / weights.sum()
    mean, var = (wide(stat)[..., None] for stat in state)
    nodes, weights = (jnp.asarray(x, mean.dtype) for x in (nodes, weights))
    mean, var, nodes, weights = aligned(mean, var, nodes, weights)
    values = fn(mean + standard_deviation(var) * nodes)
    out_mean = jnp.sum(weights * values, axis=-1)
    centred = values - out_mean[..., None]
    return KalmanState(out_mean, jnp.sum(weights * jnp.square(centred), axis=-1))


def predict_sum(a: KalmanState, b: KalmanState) -> KalmanState:
    """State of the sum of two independent branches: means and variances add."""
    return KalmanState(
        sum(aligned(a.mean, b.mean)),
        sum(aligned(a.var, b.var)),
    )


def predict_product(a: KalmanState, b: KalmanState) -> KalmanState:
    """State of the product of two independent signals, as of a map and its gate.

    mean = mu_a mu_b; var = v_a v_b + v_a mu_b^2 + v_b mu_a^2. Exact.
    """
    mean_a, var_a, mean_b, var_b = aligned(*a, *b)
    return KalmanState(
        mean_a * mean_b,
        var_a * var_b + var_a * jnp.square(mean_b) + var_b * jnp.square(mean_a),
    )


def predict_dropout(state: KalmanState, rate: float) -> KalmanState:
    """Moves a state through inverted dropout: 0 with probability `rate`, else x / keep,
    keep = 1 - `rate`. It is the product with a mask of mean 1 and variance rate / keep.

    Exact, and the same for a branch that is dropped as a whole (stochastic depth).
    """
    if rate == 1.0:
        return predict_affine(state, 0.0, 0.0)
    return predict_product(state, KalmanState(1.0, rate / (1.0 - rate)))


def predict_pad_channels(state: KalmanState, before: int, after: int) -> KalmanState:
    """Moves a state ``[..., C]`` through zero-padding of the channels: pads with 0.

    Raises:
        ValueError: a state of floats, which does not say how many channels it is of.
    """
    return KalmanState(
        *(pad_last_axis(stat, before, after) for stat in _of_known_channels(state))
    )


def pad_last_axis(
    x: Float[Array, "*batch C"], before: int, after: int
) -> Float[Array, "*batch padded"]:
    """Adds zeros to the last axis, of values or of their moments."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])


def predict_concatenate(states: Sequence[KalmanState]) -> KalmanState:
    """State of branches joined along the channel axis: joins theirs, ``[..., C_i]``,
    of which one for all examples serves each.

    Raises:
        ValueError: a state of floats, which does not say how many channels it is of.
    """
    states = [_of_known_channels(state) for state in states]
    leading = jnp.broadcast_shapes(*(state.mean.shape[:-1] for state in states))

    def join(stats: Sequence[jax.Array]) -> jax.Array:
        stats = [jnp.broadcast_to(s, (*leading, s.shape[-1])) for s in stats]
        return jnp.concatenate(stats, axis=-1)

    return KalmanState(*map(join, zip(*states, strict=True)))


def predict_group(state: KalmanState, num_groups: int) -> KalmanState:
    """Moments of groups of channels, ``[..., C]``, carried by each channel of a group.

    mean = mean of means; var = mean of variances + variance of means, over the channels
    of the group: the law of total variance, exact. Floats, of channels all alike, are
    the moments of their groups, too.

    Raises:
        ValueError: a group count that does not divide C.
    """
    mean, var = jnp.broadcast_arrays(*aligned(*state))
    if mean.ndim == 0:
        return KalmanState(mean, var)
    channels = mean.shape[-1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"num_groups is {num_groups}, but the state has {channels} channels; choose"
            " a divisor of the channel count."
        )
    size = channels // num_groups
    mean, var = (s.reshape(*s.shape[:-1], num_groups, size) for s in (mean, var))
    var = jnp.mean(var, axis=-1) + jnp.var(mean, axis=-1)
    mean = jnp.mean(mean, axis=-1)
    return KalmanState(*(jnp.repeat(stat, size, axis=-1) for stat in (mean, var)))


def _of_known_channels(state: KalmanState) -> KalmanState:
    """Returns `state` with mean and variance of one shape ``[..., C]``."""
    mean, var = jnp.broadcast_arrays(*aligned(*state))
    if mean.ndim == 0:
        raise ValueError(
            f"the state is {tuple(state)}, the same for every channel, but not of how"
            " many; say it by kalman_flax.filter.for_channels(state, channels)."
        )
    return KalmanState(mean, var)
