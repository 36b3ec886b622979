"""A batch whose examples share statistics only with those of their micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from kalman_flax._filter.mixture import merged
from kalman_flax._filter.state import KalmanState

Tree = TypeVar("Tree")


def each(fn: Callable[..., Tree], size: int, axis: int) -> Callable[..., Tree]:
    """Returns ``fn(value, mask, predicted)`` for every micro-batch by itself.

    A plain `jax.vmap` over a reshaped batch: where that is split over devices so that
    each holds whole micro-batches, the devices have nothing to tell each other.

    Args:
        fn: of ``[size, ..., C]``, a mask of that shape or None, and a state ``[C]`` or
            None.
        size: of a micro-batch.
        axis: of the channels.

    Returns:
        A function of ``[N, ..., C]``, a mask or None, and a state ``[C]``, ``[N, C]``
        or None; its results have a leading axis of N / size micro-batches.

    Raises:
        ValueError: N is no multiple of `size`; the channels stand in its place.
    """

    def on_batch(
        value: jax.Array, mask: jax.Array | None, predicted: KalmanState | None
    ) -> Tree:
        examples = value.shape[0]
        if not axis % value.ndim:
            raise ValueError(
                f"axis is {axis}, where micro_batch_size={size} expects the examples;"
                " put the channels last."
            )
        if examples % size:
            raise ValueError(
                f"a batch of {examples} examples is no multiple of"
                f" micro_batch_size={size}; give whole micro-batches in training."
            )

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(examples // size, size, *x.shape[1:])

        if mask is not None:
            mask = split(jnp.broadcast_to(jnp.asarray(mask, bool), value.shape))
        one_for_all = predicted is None or jnp.ndim(predicted.mean) == 1
        if not one_for_all:
            predicted = jax.vmap(merged)(jax.tree.map(split, predicted))
        mapped = jax.vmap(fn, in_axes=(0, 0, None if one_for_all else 0))
        return mapped(split(value), mask, predicted)

    return on_batch


def of_examples(state: KalmanState, size: int) -> KalmanState:
    """The state ``[N, C]`` of each example, from that of each micro-batch."""
    return KalmanState(*(jnp.repeat(stat, size, axis=0) for stat in state))
