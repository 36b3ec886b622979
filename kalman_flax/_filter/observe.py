"""Moments of a micro-batch over a set S_i of its values (paper, Eq. 1 and 8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from kalman_flax._filter.state import KalmanState, check_choice
from kalman_flax._kernels import mean_and_variance

Set = Literal["batch", "group", "layer", "instance"]


def observe(
    x: Num[Array, "*N_map_and_C"],
    over: Set = "batch",
    *,
    num_groups: int | None = None,
    axis: int = -1,
    mask: Bool[Array, "*#N_map_and_C"] | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Any = None,
) -> KalmanState:
    """Mean and biased variance of `x` over the set that each value belongs to.

    Two centred passes in float32 or wider: the one-pass form E[x^2] - E[x]^2 gives 0
    for data at 1e4 +- 1.

    Args:
        x: ``[N, ..., C]`` activation of any real dtype, channels at `axis`.
        over: the set S_i. ``"batch"``: all values of a channel. ``"group"``: the
            values of one example in a group of channels. ``"layer"``: all values
            of one example. ``"instance"``: one channel of one example.
        num_groups: G, for ``"group"`` only.
        axis: the channel axis.
        mask: broadcastable to `x`; values where it is false do not count. A set
            that is masked out entirely has mean 0 and variance 0.
        axis_name: mapped axis to share the statistics over, weighted by counts.
        axis_index_groups: of `lax.psum`, the groups of devices that share.

    Returns:
        State of float32, or float64 for float64: ``[C]`` for ``"batch"``, ``[N, C]``
        otherwise, where each channel carries the moments of its set.

    Raises:
        ValueError: unknown set, a group count that does not divide C, complex values,
            or sets without values.
    """
    check_choice("over", over, get_args(Set))
    x, mask = _channels_last(x, mask, axis)
    shared = (axis_name, axis_index_groups)
    if over == "batch":
        return _moments(x, tuple(range(x.ndim - 1)), mask, *shared)

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
    state = _moments(x.reshape(split), axes, mask, *shared)
    return KalmanState(*(jnp.repeat(s, channels // groups, axis=-1) for s in state))


def observe_about(
    x: Num[Array, "*N_map_and_C"],
    guess: Float[Array, " C"],
    axis: int = -1,
    mask: Bool[Array, "*#N_map_and_C"] | None = None,
) -> KalmanState:
    """`observe` over the batch, on a GPU or TPU in one pass about `guess`, ``[C]``.

    The rounding error of the variance grows by some 1e-7 (mean - guess)^2: for whoever
    knows that it does not count. The guess has no gradient.
    """
    x, mask = _channels_last(x, mask, axis)
    return KalmanState(*mean_and_variance(x, guess, mask, tuple(range(x.ndim - 1))))


def _channels_last(
    x: jax.Array, mask: jax.Array | None, axis: int
) -> tuple[jax.Array, jax.Array | None]:
    """Both with the channels last, `x` in float32 or wider, the mask of its shape."""
    if mask is not None:
        mask = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)
        mask = jnp.moveaxis(mask, axis, -1)
    return jnp.moveaxis(_wide(x), axis, -1), mask


def count_values(shape: Sequence[int], axes: Sequence[int]) -> int:
    """The size of a set of values, over `axes` of an activation of `shape`.

    Raises:
        ValueError: it is empty.
    """
    count = math.prod(shape[axis] for axis in axes)
    if not count:
        raise ValueError(
            f"an activation of shape {tuple(shape)} has no values to take the moments"
            " of; leave empty batches and maps out of training."
        )
    return count


def _wide(x: jax.Array) -> jax.Array:
    """`x` in float32, or in its own dtype where that is wider."""
    if jnp.iscomplexobj(x):
        raise ValueError(
            f"moments are those of real values, but the activation is {x.dtype};"
            " take real and imaginary parts as channels."
        )
    return jnp.asarray(x, jnp.result_type(x, jnp.float32))


def _moments(
    x: jax.Array,
    axes: tuple[int, ...],
    mask: jax.Array | None,
    axis_name: str | Sequence[str] | None,
    axis_index_groups: Any,
) -> KalmanState:
    if axis_name is None:
        count_values(x.shape, axes)
        return KalmanState(*mean_and_variance(x, None, mask, axes))

    def total(values: jax.Array) -> jax.Array:
        result = jnp.sum(values, axes, where=mask, keepdims=True)
        return lax.psum(result, axis_name, axis_index_groups=axis_index_groups)

    count = jnp.maximum(total(jnp.ones_like(x)), 1.0)
    mean = total(x) / count
    # Where the mask is false x may be NaN, and so may the gradient of its square.
    centred = x - mean if mask is None else jnp.where(mask, x - mean, 0.0)
    var = total(jnp.square(centred)) / count
    return KalmanState(jnp.squeeze(mean, axes), jnp.squeeze(var, axes))
