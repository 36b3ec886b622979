"""The two losses that all parts of a detector are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def binary_cross_entropy(
    logits: Float[Array, "*B"], targets: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """Returns -log of the probability of the targets, which may lie between 0 and 1."""
    return jax.nn.softplus(logits) - targets * logits


def huber(error: Float[Array, "*B"], delta: float) -> Float[Array, "*B"]:
    """Returns error^2 / 2 up to delta, and delta (|error| - delta / 2) beyond."""
    size = jnp.abs(error)
    return jnp.where(size <= delta, size**2 / 2, delta * (size - delta / 2))


def mean(values: Float[Array, "*B"], over: Bool[Array, "*B"]) -> Float[Array, ""]:
    """Returns the mean of the values `over` which it is to go; 0 of none."""
    total = jnp.sum(jnp.where(over, values, 0))
    return total / jnp.maximum(jnp.sum(over), 1)
