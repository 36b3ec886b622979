"""Boxes: overlap, anchors, and what a network says of one relative to another.

A box is x1, y1, x2, y2 in pixels of the canvas, continuous: a box over all of an image
of height H and width W is 0, 0, W, H, and the pixel in its corner has its centre at
(0.5, 0.5). Everything here is of one image; `jax.vmap` maps it over several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

#: A decoded side is at most so many times that of its anchor, as a logarithm: 1333 is
#: the longest side of an image of the recipe and 16 the stride of its map.
MAX_LOG_SCALE = math.log(1333 / 16)


def area(boxes: Float[Array, "*B 4"]) -> Float[Array, "*B"]:
    """Returns width times height; 0 for a box whose sides are not positive."""
    x1, y1, x2, y2 = jnp.moveaxis(boxes, -1, 0)
    return jnp.maximum(x2 - x1, 0) * jnp.maximum(y2 - y1, 0)


def iou(a: Float[Array, "A 4"], b: Float[Array, "B 4"]) -> Float[Array, "A B"]:
    """Returns the intersection over the union of each pair; 0 where both are empty."""
    a, b = a[:, None], b[None]
    corner = jnp.maximum(a[..., :2], b[..., :2])
    shared = area(
        jnp.concatenate([corner, jnp.minimum(a[..., 2:], b[..., 2:])], axis=-1)
    )
    union = area(a) + area(b) - shared
    return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1), 0)


def clip(boxes: Float[Array, "*B 4"], size: Num[Array, " 2"]) -> Float[Array, "*B 4"]:
    """Returns the parts of the boxes inside an image of `size`, height and width."""
    height, width = size[0], size[1]
    limit = jnp.stack([width, height, width, height]).astype(boxes.dtype)
    return jnp.clip(boxes, 0, limit)


def inside(boxes: Float[Array, "*B 4"], size: Num[Array, " 2"]) -> Bool[Array, "*B"]:
    """Returns which boxes lie wholly inside an image of `size`, height and width."""
    x1, y1, x2, y2 = jnp.moveaxis(boxes, -1, 0)
    return (x1 >= 0) & (y1 >= 0) & (x2 <= size[1]) & (y2 <= size[0])


def encode(
    boxes: Float[Array, "*B 4"], anchors: Float[Array, "*B 4"]
) -> Float[Array, "*B 4"]:
    """Returns how boxes differ from anchors: (dx, dy, dw, dh).

    The offset of the centre in sides of the anchor, and the logarithm of the ratio of
    the sides (Girshick et al., 2014, "Rich feature hierarchies", appendix C). Boxes and
    anchors without a positive side count as one pixel, so that empty slots stay finite.
    """
    centre, side = _centre_and_side(boxes)
    anchor_centre, anchor_side = _centre_and_side(anchors)
    side, anchor_side = (jnp.where(s > 0, s, 1) for s in (side, anchor_side))
    offset = (centre - anchor_centre) / anchor_side
    return jnp.concatenate([offset, jnp.log(side / anchor_side)], axis=-1)


def decode(
    deltas: Float[Array, "*B 4"], anchors: Float[Array, "*B 4"]
) -> Float[Array, "*B 4"]:
    """Returns the boxes that `encode` would say `deltas` of; no side grows by more than
    `MAX_LOG_SCALE` tells."""
    centre, side = _centre_and_side(anchors)
    centre = centre + deltas[..., :2] * side
    side = side * jnp.exp(jnp.minimum(deltas[..., 2:], MAX_LOG_SCALE))
    return jnp.concatenate([centre - side / 2, centre + side / 2], axis=-1)


def _centre_and_side(
    boxes: Float[Array, "*B 4"],
) -> tuple[Float[Array, "*B 2"], Float[Array, "*B 2"]]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, high - low


def make_anchors(
    map_size: Sequence[int],
    stride: int,
    sizes: Sequence[float],
    ratios: Sequence[float],
) -> np.ndarray:
    """Returns the anchors of a map, centred on its cells.

    As tensorpack makes them, after py-faster-rcnn: for each ratio of height to width
    the sides of a box with the area of a cell, rounded to pixels, times size / stride.
    (torchvision and detectron2 centre them on a cell's corner.)

    Args:
        map_size: height and width of the map.
        stride: pixels of the canvas for each of its cells.
        sizes: square roots of the areas, in pixels.
        ratios: of height to width.

    Returns:
        ``[height, width, A, 4]`` float32, A = len(ratios) len(sizes), sizes in a row.
    """
    shapes = []
    for ratio in ratios:
        width = np.round(np.sqrt(stride**2 / ratio))
        height = np.round(width * ratio)
        shapes += [(width * size / stride, height * size / stride) for size in sizes]
    half = np.array(shapes)[None, None] / 2  # [1, 1, A, 2]
    y, x = np.meshgrid(*(np.arange(n) for n in map_size), indexing="ij")
    centre = (np.stack([x, y], axis=-1)[:, :, None] + 0.5) * stride  # [H, W, 1, 2]
    return np.concatenate([centre - half, centre + half], axis=-1).astype(np.float32)
