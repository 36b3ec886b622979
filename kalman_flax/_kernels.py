"""What the compiler of a CPU needs, and those of GPUs and TPUs must not have."""

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


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def mean_and_variance(
    x: jax.Array, guess: jax.Array | None, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of `x` over `axes`.

    Two centred passes; with a `guess` of the mean, on a GPU or TPU, one pass about
    that. See `kalman_flax._filter.observe.observe_about`.
    """
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


@mean_and_variance.defjvp
def _mean_and_variance_jvp(
    axes: tuple[int, ...], primals: Any, tangents: Any
) -> tuple[Any, Any]:
    """d mean = E[dx]; d var = 2 E[(x - mean) dx], for E[(x - mean) d mean] is 0: one
    sum over the positions less in the backward pass."""
    (x, guess), (d_x, _) = primals, tangents  # the guess makes no difference
    mean, var = mean_and_variance(x, guess, axes)
    # Has XLA:CPU subtract again: it would keep x - mean in memory, beside x.
    centred = x - jnp.expand_dims(hold(mean), axes)
    return (mean, var), (jnp.mean(d_x, axes), 2.0 * jnp.mean(centred * d_x, axes))


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
