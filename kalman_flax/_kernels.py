"""What compilers need: the same mathematics, in the form that suits each best."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Tree = TypeVar("Tree")


def hold(tree: Tree) -> Tree:
    """On a CPU an optimisation barrier, elsewhere `tree` itself.

    XLA:CPU fuses what is cheap to say into all that reads it, and so computes small
    vectors again at every pixel, and gradients once for each reader. On a TPU the
    barriers that prevent this cost 2.6 times the memory traffic: they keep layouts from
    being chosen, and moments from being summed in the convolution before them.
    """
    return lax.platform_dependent(
        tree, cpu=lax.optimization_barrier, default=lambda tree: tree
    )


def compiler_options() -> dict[str, str]:
    """Returns what to compile a training step with, for the default backend:
    ``jax.jit(step, compiler_options=kf.compiler_options())``.

    XLA:CPU drops optimisation barriers before it fuses, and then computes the filter's
    small vectors again at every pixel; these options keep them. Elsewhere, none.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def mean_and_variance(
    x: jax.Array,
    guess: jax.Array | None,
    mask: jax.Array | None,
    axes: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of `x` over `axes`, where `mask` is true; 0 and 0 where
    it nowhere is.

    Two centred passes; with a `guess` of the mean, on a GPU or TPU, one pass about
    that. See `kalman_flax._filter.observe.observe_about`.
    """
    if guess is None:
        return _two_passes(x, mask, axes)
    # XLA:CPU takes as long for two sums in one pass as in two.
    return lax.platform_dependent(
        x,
        guess,
        mask,
        cpu=lambda x, _, mask: _two_passes(x, mask, axes),
        default=functools.partial(_one_pass, axes=axes),
    )


def _mean(
    x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...], **options: Any
) -> jax.Array:
    """`jnp.mean` where the mask, of the shape of `x`, is true; 0 where it nowhere is.
    Elsewhere `x` may be NaN."""
    if mask is None:
        return jnp.mean(x, axes, **options)
    count = jnp.sum(mask, axes, x.dtype, **options)
    return jnp.sum(x, axes, where=mask, **options) / jnp.maximum(count, 1)


def _two_passes(
    x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    if mask is None:
        return jnp.mean(x, axes), jnp.var(x, axes)
    mean = _mean(x, mask, axes)
    centred = x - jnp.expand_dims(mean, axes)
    return mean, _mean(jnp.square(centred), mask, axes)


def _one_pass(
    x: jax.Array, guess: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """mean = c + E[x - c], var = E[(x - c)^2] - E[x - c]^2, c = `guess`: known before
    `x` is, so that the convolution that computes `x` can sum up both on the way."""
    away = x - jnp.expand_dims(guess, axes)
    mean = _mean(away, mask, axes)
    square = _mean(jnp.square(away), mask, axes)
    var = jnp.maximum(square - jnp.square(mean), 0.0)
    if mask is not None:
        guess = jnp.where(jnp.any(mask, axes), guess, 0.0)
    return guess + mean, var


@mean_and_variance.defjvp
def _mean_and_variance_jvp(
    axes: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[Any, Any]:
    """d mean = E[dx]; d var = 2 E[(x - mean) dx], for E[(x - mean) d mean] is 0: one
    sum over the positions less in the backward pass."""
    (x, guess, mask), (d_x, *_) = primals, tangents  # the guess makes no difference
    mean, var = mean_and_variance(x, guess, mask, axes)
    # Has XLA:CPU subtract again: it would keep x - mean in memory, beside x.
    centred = x - jnp.expand_dims(hold(mean), axes)
    if mask is not None:  # elsewhere it may be NaN, which 0 does not make 0
        centred = jnp.where(mask, centred, 0.0)
    d_var = 2.0 * _mean(centred * d_x, mask, axes)
    return (mean, var), (_mean(d_x, mask, axes), d_var)


@jax.custom_jvp
def centre_and_scale(
    x: jax.Array, centre: jax.Array, slope: jax.Array, offset: jax.Array
) -> jax.Array:
    """(x - centre) slope + offset, the last three broadcast against `x`."""
    return (x - centre) * slope + offset


@centre_and_scale.defjvp
def _centre_and_scale_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The product rule, with what is the same at all positions summed up first: in the
    backward pass two sums over the positions give all gradients."""
    x, centre, slope, _ = primals
    d_x, d_centre, d_slope, d_offset = tangents
    # Has XLA:CPU subtract again, as above, and take the one sum over the positions for
    # both gradients that it gives.
    everywhere = hold(d_offset - slope * d_centre)
    centred = x - hold(centre)
    tangent = slope * d_x + centred * d_slope + everywhere
    return centre_and_scale(*primals), tangent


def tap_products(stat: jax.Array, kernel: jax.Array, groups: int) -> jax.Array:
    """stat . W_t for every tap t of a grouped kernel.

    Args:
        stat: ``[..., C]``.
        kernel: ``[taps, C / groups, D]``.
        groups: feature groups, each with its own part of C and D.

    Returns:
        ``[..., taps, D]``.
    """
    taps, channels, features = kernel.shape
    out = lax.platform_dependent(
        stat.reshape(*stat.shape[:-1], groups, channels),
        kernel.reshape(taps, channels, groups, features // groups),
        cpu=_tap_by_tap,
        default=_all_taps,
    )
    return out.reshape(*stat.shape[:-1], taps, features)


def _all_taps(stat: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[..., groups, C / groups]`` and ``[taps, C / groups, groups, D / groups]`` to
    ``[..., taps, groups, D / groups]``."""
    return jnp.einsum(
        "...gc,tcgo->...tgo", stat, kernel, precision=lax.Precision.HIGHEST
    )


def _tap_by_tap(stat: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same by a product for each tap and group, with the kernel on the right: for
    the other XLA:CPU keeps a transposed copy of the kernel, and another of its square.
    On a GPU this one takes 3 to 10 % more kernels."""
    taps, channels, groups, features = kernel.shape
    states = stat.reshape(-1, groups, channels).swapaxes(0, 1)
    out = jnp.matmul(
        jnp.tile(states, (taps, 1, 1)),
        kernel.swapaxes(1, 2).reshape(taps * groups, channels, features),
        precision=lax.Precision.HIGHEST,
    )
    out = jnp.moveaxis(out.reshape(taps, groups, -1, features), 2, 0)
    return out.reshape(*stat.shape[:-2], taps, groups, features)


def weighted_sum(weights: jax.typing.ArrayLike, terms: jax.Array) -> jax.Array:
    """Sums ``[..., T, D]`` up by weights ``[..., T]``, to ``[..., D]``: not a product,
    which would be a kernel by itself on a GPU."""
    weights = jnp.asarray(weights)[..., None]
    leading = range(terms.ndim - weights.ndim)
    return jnp.sum(jnp.expand_dims(weights, leading) * terms, axis=-2)


@jax.custom_jvp
def mean_and_spread(m: jax.Array, p: Any, k: Any) -> tuple[jax.Array, jax.Array]:
    """P . m and m' K m of each feature, the second never negative.

    Args:
        m: ``[..., T, D]``.
        p: ``[T]``, a constant.
        k: ``[T, T]``, symmetric, a constant.
    """
    mean, weighed = _mean_and_weighed(m, p, k)
    spread = jnp.sum(m * weighed, axis=-2)
    return mean, jnp.maximum(spread, 0.0)  # below 0 by rounding alone


@mean_and_spread.defjvp
def _mean_and_spread_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """d(m' K m) = 2 (K m)' dm, as K is symmetric: no second product for gradients."""
    (m, p, k), (d_m, *_) = primals, tangents
    _, weighed = _mean_and_weighed(m, p, k)
    d_spread = jnp.sum(2.0 * weighed * d_m, axis=-2)
    return mean_and_spread(*primals), (weighted_sum(p, d_m), d_spread)


def _mean_and_weighed(m: jax.Array, p: Any, k: Any) -> tuple[jax.Array, jax.Array]:
    """Returns P . m and K m, by one sum for a kernel less on a GPU."""
    both = weighted_sum(jnp.stack([p, *k]), m[..., None, :, :])
    return both[..., 0, :], both[..., 1:, :]
