"""Blocks that keep less for the backward pass, and compute it again there."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

_KEPT = "kept"


def keep(tree: Any) -> Any:
    """Marks what `remat` keeps besides convolutions."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, _KEPT), tree)


def remat(block: type[nn.Module], **options: Any) -> type[nn.Module]:
    """`nn.remat` that keeps what convolutions give, and the filtered moments.

    What lies between two convolutions, normalised and activated, is half of what
    training holds; it is computed again in the backward pass of its block, and only
    what enters the block is kept besides. Gradients are the same.

    Args:
        block: a class of modules.
        options: of `nn.remat`, e.g. ``static_argnums=(2,)`` where `__call__` takes a
            flag after the Signal.
    """
    policies = jax.checkpoint_policies
    policy = policies.save_from_both_policies(
        lambda primitive, *_, **__: primitive is lax.conv_general_dilated_p,
        policies.save_only_these_names(_KEPT),
    )
    return nn.remat(block, policy=policy, **options)
