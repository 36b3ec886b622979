"""RoIAlign: what a map shows inside of boxes, resampled to one size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

#: Boxes of which the products are held at once. Unchunked, those of 256 boxes take 1.4
#: GB in float32 at the size of the recipe, and the loop over chunks is no slower.
CHUNK = 16


def hats(positions: Float[Array, " P"], size: int) -> Float[Array, "P S"]:
    """Returns the weights of linear interpolation at `positions` of a row of `size`
    values: 0 is the centre of the first, and beyond the ends the values are 0."""
    cells = jnp.arange(size, dtype=positions.dtype)
    return jnp.maximum(1 - jnp.abs(positions[:, None] - cells), 0)


def sample_positions(
    low: jax.Array, high: jax.Array, valid: jax.Array, stride: Any, output: int
) -> Float[Array, " 2*output"]:
    """Returns where RoIAlign samples along an axis, two for each bin, in cells.

    Args:
        low, high: of the box, in pixels.
        valid: cells in the valid part of the map, to which the samples are moved.
        stride: pixels for each cell.
        output: bins.
    """
    bins = (jnp.arange(2 * output) + 0.5) / (2 * output)
    positions = (low + bins * (high - low)) / stride - 0.5
    return jnp.clip(positions, 0, jnp.maximum(valid - 1, 0).astype(positions.dtype))


def roi_align(
    features: Float[Array, "H W C"],
    boxes: Float[Array, "R 4"],
    size: Num[Array, " 2"],
    *,
    stride: int,
    output: int,
) -> Float[Array, "R output output C"]:
    """Resamples the map inside of each box to `output` x `output` bins.

    A bin is the mean of 2x2 bilinear samples (He et al., 2017, "Mask R-CNN", section
    3). Pixels are areas: the first cell of the map has its centre at stride / 2 of the
    canvas ("aligned", half-pixel). Beyond the valid part the map is continued by its
    last row and column. The weights of a bilinear sample are a product over the axes,
    so that two small matrix products do it, box by box; their gradient computes them
    again.

    Args:
        features: a map of one image.
        boxes: x1, y1, x2, y2 in pixels of the canvas.
        size: height and width of the valid part of the map, in cells.
        stride: pixels of the canvas for each cell.
        output: bins along an axis.
    """
    height, width, _ = features.shape

    def weights(
        low: jax.Array, high: jax.Array, valid: jax.Array, cells: int
    ) -> Float[Array, "output cells"]:
        sampled = hats(sample_positions(low, high, valid, stride, output), cells)
        mean = sampled.reshape(output, 2, cells).mean(1)
        return mean.astype(features.dtype)

    @jax.checkpoint
    def crop(box: Float[Array, " 4"]) -> Float[Array, "output output C"]:
        x1, y1, x2, y2 = box
        rows = weights(y1, y2, size[0], height)
        columns = weights(x1, x2, size[1], width)
        return jnp.einsum(
            "qw,pwc->pqc", columns, jnp.einsum("ph,hwc->pwc", rows, features)
        )

    return lax.map(crop, boxes, batch_size=min(CHUNK, len(boxes)))


def crop_masks(
    masks: Float[Array, "R M M"],
    boxes: Float[Array, "R 4"],
    rois: Float[Array, "R 4"],
    output: int,
) -> Float[Array, "R output output"]:
    """Resamples masks of objects from the objects' boxes to regions of interest.

    Bilinear, one sample at the centre of each bin, and 0 outside of the object's box.

    Args:
        masks: of the objects, each over its own box, in [0, 1].
        boxes: of the objects; empty ones give a mask of zeros, or of no meaning.
        rois: the regions.
        output: bins along an axis.
    """
    cells = masks.shape[-1]

    def crop(
        mask: Float[Array, "M M"], box: Float[Array, " 4"], roi: Float[Array, " 4"]
    ) -> Float[Array, "output output"]:
        low, side = box[:2], box[2:] - box[:2]
        side = jnp.where(side > 0, side, 1)
        bins = (jnp.arange(output)[:, None] + 0.5) / output
        positions = roi[:2] + bins * (roi[2:] - roi[:2])  # [output, 2], x and y
        x, y = ((positions - low) / side * cells - 0.5).T
        return hats(y, cells) @ mask @ hats(x, cells).T

    return jax.vmap(crop)(masks, boxes, rois)
