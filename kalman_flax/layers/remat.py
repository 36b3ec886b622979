"""Blocks that keep less for the backward pass, and compute it again there."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

_KEPT = "kept"


def keep(tree: Any) -> Any:
    """Marks what `remat` keeps, as it is dear to compute and, or, small."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, _KEPT), tree)


def remat(block: type[nn.Module]) -> type[nn.Module]:
    """`nn.remat` that keeps what convolutions give and the filtered moments.

    What lies between two convolutions, normalised and activated, is half of what
    training holds; it is computed again in the backward pass of its block, and only
    what enters the block is kept besides. Gradients are the same. Call it on a class of
    modules whose `__call__` takes arrays and Signals alone.
    """
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    return nn.remat(block, policy=policy)
