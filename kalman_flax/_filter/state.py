"""What the filter believes of an activation, and the checks that guard it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

#: a parameter of each channel, or one for all of them
OfChannels = Float[Array, " C"] | float


class KalmanState(NamedTuple):
    """Mean and variance of an activation, channel by channel.

    A pytree of fixed structure, so it can be the carry of a scan. Floats stand
    for every channel alike: ``KalmanState(0.0, 1.0)`` is a standardised image.

    Attributes:
        mean: ``[..., C]`` float32 or wider, mu in the paper.
        var: ``[..., C]`` float32 or wider, the diagonal of Sigma, never negative.
    """

    # "| Any" is a float to those who make a state. Those who read one, of a layer or
    # of `for_channels`, have an array and need not ask.
    mean: Float[Array, "*batch C"] | Any
    var: Float[Array, "*batch C"] | Any


def for_channels(state: KalmanState, channels: int) -> KalmanState:
    """Returns `state` as ``[..., channels]``, in float32 or wider.

    Raises:
        ValueError: the state describes another number of channels.
    """

    def broadcast(name: str, stat: jax.Array | float) -> jax.Array:
        stat = wide(stat)
        if stat.ndim and stat.shape[-1] != channels:
            raise ValueError(
                f"KalmanState.{name} has shape {stat.shape}, but the activation has"
                f" {channels} channels. The state must end in the activation's channel"
                " count; pass state=None where nothing is known."
            )
        return jnp.broadcast_to(stat, (*stat.shape[:-1], channels))

    return KalmanState(broadcast("mean", state.mean), broadcast("var", state.var))


def aligned(*stats: jax.typing.ArrayLike) -> list[jax.Array]:
    """Returns `stats` in one rank, by leading axes of 1, and as `wide`; scalars stay.

    So ``[C]`` stands beside ``[N, C]`` even where ``jax_numpy_rank_promotion`` refuses
    arrays of different ranks.
    """
    arrays = [wide(stat) for stat in stats]
    rank = max(array.ndim for array in arrays)
    return [
        jnp.expand_dims(array, range(rank - array.ndim)) if array.ndim else array
        for array in arrays
    ]


def wide(stat: jax.typing.ArrayLike) -> jax.Array:
    """Returns `stat` in float32, or as it is where that is float64."""
    return jnp.asarray(stat, jnp.result_type(stat, jnp.float32))


def standard_deviation(var: jax.Array) -> jax.Array:
    """sqrt(var) with a finite gradient at 0.

    The floor is far below any variance that matters: values at 1e-6 have 1e-12.
    """
    return jnp.sqrt(jnp.maximum(var, 0.0) + 1e-15)


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raises a ValueError that lists `choices` unless `value` is one of them."""
    if value not in (choices := tuple(choices)):
        raise ValueError(f"{name} is {value!r}; expected one of {list(choices)}.")
