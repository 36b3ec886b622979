"""Non-maximum suppression: exact, and of fixed shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kalman_flax.models.detection.boxes import iou

#: boxes whose overlaps with one another are held at once, `TILE` squared numbers
TILE = 2048


def suppress(
    boxes: Float[Array, "B 4"], scores: Float[Array, " B"], threshold: float
) -> Bool[Array, " B"]:
    """Returns which boxes greedy non-maximum suppression keeps; it has no gradient.

    Greedily, best score first, a box is kept unless its IoU with one kept before it is
    above `threshold`; of equal scores the first goes first. That is the only solution
    of ``keep = not any(overlaps & keep)`` over the better boxes, since the best box is
    kept whatever the rest is, hence the second is settled, and so on. Iterating it from
    "all are kept" settles at least one box a round, and in practice all in 4 to 8. It
    goes tile by tile, so that the overlaps of all pairs are never held at once.

    Args:
        boxes: of one image.
        scores: of the boxes; those of -inf are empty slots, never kept.
        threshold: of the IoU.
    """
    boxes, scores = lax.stop_gradient((boxes, scores))
    order = jnp.argsort(-scores, stable=True)
    count = scores.size
    tiles = max(-(-count // TILE), 1)
    size = -(-count // tiles)
    padding = (0, tiles * size - count)
    boxes = jnp.pad(boxes[order], (padding, (0, 0)))
    used = jnp.pad(scores[order] > -jnp.inf, padding)
    rank = jnp.arange(size)

    def settle(tile: Int[Array, ""], keep: Bool[Array, " P"]) -> Bool[Array, " P"]:
        """Decides the boxes of one tile; in `keep` are those of earlier ones."""
        start = tile * size
        mine = lax.dynamic_slice_in_dim(boxes, start, size)
        free = lax.dynamic_slice_in_dim(used, start, size)
        if tiles > 1:
            free &= ~jnp.any((iou(boxes, mine) > threshold) & keep[:, None], axis=0)
        overlaps = (iou(mine, mine) > threshold) & (rank[:, None] < rank)
        settled = _fixed_point(overlaps, free)
        return lax.dynamic_update_slice_in_dim(keep, settled, start, axis=0)

    keep = lax.fori_loop(0, tiles, settle, jnp.zeros_like(used))
    return jnp.zeros(count, bool).at[order].set(keep[:count])


def _fixed_point(
    overlaps: Bool[Array, "T T"], free: Bool[Array, " T"]
) -> Bool[Array, " T"]:
    """Solves keep[j] = free[j] and not any_i(overlaps[i, j] and keep[i]), where
    `overlaps` is false unless i < j."""

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        keep, _ = carry
        return free & ~jnp.any(overlaps & keep[:, None], axis=0), keep

    first = step((free, free))
    return lax.while_loop(lambda c: jnp.any(c[0] != c[1]), step, first)[0]


def best(
    boxes: Float[Array, "B 4"],
    scores: Float[Array, " B"],
    threshold: float,
    count: int,
    groups: Int[Array, " B"] | None = None,
) -> tuple[Int[Array, " K"], Bool[Array, " K"]]:
    """Returns the `count` best of the boxes that `suppress` keeps, best first.

    Args:
        boxes, scores, threshold: as in `suppress`.
        count: how many slots to fill, K; with fewer boxes than that, one for each.
        groups: suppress only among boxes of the same group, as of one class, or level
            of a pyramid. Groups are moved apart by more than the boxes reach.

    Returns:
        index: of the boxes.
        used: false in the slots that are left over.
    """
    if groups is not None:
        low, high = jnp.min(boxes), jnp.max(boxes)
        apart = groups.astype(boxes.dtype) * (high - low + 1)
        boxes = boxes + apart[:, None]
    scores = jnp.where(suppress(boxes, scores, threshold), scores, -jnp.inf)
    scores, index = lax.top_k(scores, min(count, scores.size))
    return index, scores > -jnp.inf
