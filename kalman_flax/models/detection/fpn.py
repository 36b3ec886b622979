"""Mask R-CNN on a feature pyramid, with norms in pyramid and heads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from kalman_flax.layers.functions import max_pool, resize
from kalman_flax.layers.signal import Signal
from kalman_flax.models.detection.boxes import area
from kalman_flax.models.detection.mask_rcnn import MaskRCNN
from kalman_flax.models.detection.recipe import Recipe
from kalman_flax.models.detection.roi_align import CHUNK, sample_positions
from kalman_flax.models.network import Layers


def level_of(
    boxes: Float[Array, "*B 4"], levels: int, canonical_size: float = 224
) -> Int[Array, "*B"]:
    """Returns which map of a pyramid shows a box, 0 for the finest.

    Boxes of `canonical_size` go to the third map, those of half the side to the one
    below it, and so on (Lin et al., 2017, "Feature pyramid networks", Eq. 1).

    Args:
        boxes: of any image.
        levels: number of maps; coarser or finer boxes go to the last or first.
        canonical_size: the square root of an area.
    """
    side = jnp.sqrt(jnp.maximum(area(boxes), 1e-12))
    # As in torchvision, so that boxes of just that size are not below it by rounding.
    level = jnp.floor(2 + jnp.log2(side / canonical_size) + 1e-6)
    return jnp.clip(level, 0, levels - 1).astype(jnp.int32)


def roi_align_pyramid(
    maps: Sequence[Float[Array, "H W C"]],
    boxes: Float[Array, "R 4"],
    levels: Int[Array, " R"],
    size: Num[Array, " 2"],
    *,
    strides: Sequence[int],
    output: int,
) -> Float[Array, "R output output C"]:
    """`roi_align` of each box on its own map.

    The maps lie end to end in memory, and the four neighbours of each sample are
    gathered: on large maps that is a tenth of the work of two products.

    Args:
        maps: of one image, finest first.
        boxes: x1, y1, x2, y2 in pixels of the canvas.
        levels: index of each box's map.
        size: height and width of the valid part of the canvas, in pixels.
        strides: pixels of the canvas for each cell, by map.
        output: bins along an axis.
    """
    channels = maps[0].shape[-1]
    cells = jnp.concatenate([m.reshape(-1, channels) for m in maps])
    counts = [m.shape[0] * m.shape[1] for m in maps]
    starts = jnp.asarray(np.cumsum([0, *counts[:-1]]))
    widths = jnp.asarray([m.shape[1] for m in maps])
    of_level = jnp.asarray(strides)

    @jax.checkpoint
    def crop(of_box: tuple[jax.Array, jax.Array]) -> Float[Array, "output output C"]:
        (x1, y1, x2, y2), level = of_box
        stride = of_level[level]
        valid = -(-size // stride)
        y = sample_positions(y1, y2, valid[0], stride, output)[:, None]
        x = sample_positions(x1, x2, valid[1], stride, output)[None]
        sampled = 0.0
        for row, of_row in _neighbours(y, valid[0]):
            for column, of_column in _neighbours(x, valid[1]):
                index = starts[level] + row * widths[level] + column
                weight = (of_row * of_column)[..., None].astype(cells.dtype)
                sampled += weight * cells[index]
        return jnp.mean(
            jnp.reshape(sampled, (output, 2, output, 2, channels)), axis=(1, 3)
        )

    return lax.map(crop, (boxes, levels), batch_size=min(CHUNK, len(boxes)))


def _neighbours(
    positions: jax.Array, valid: jax.Array
) -> list[tuple[jax.Array, jax.Array]]:
    """The two cells that each position lies between, and their weights."""
    first = jnp.floor(positions)
    share = positions - first
    first = first.astype(jnp.int32)
    second = jnp.minimum(first + 1, jnp.maximum(valid - 1, 0))
    return [(first, 1 - share), (second, share)]


class Convolutions(nn.Module):
    """Four 3x3 convolutions, each with norm and activation.

    Attributes:
        layers: norm, convolution and activation.
        features: channels of each.
    """

    layers: Layers
    features: int

    @nn.compact
    def __call__(self, x: Signal) -> Signal:
        """Maps ``[R, H, W, C]`` to ``[R, H, W, features]``."""
        for number in range(1, 5):
            x = self.layers.conv_norm_activation(
                x, self.features, 3, name=f"conv{number}"
            )
        return x


class MaskRCNNFPN(MaskRCNN):
    """Mask R-CNN on a feature pyramid (Lin et al., 2017), normalised throughout: in
    laterals and outputs of the pyramid, in the four convolutions in front of the box
    head, and in those of the mask head. There, and not in the backbone alone, group
    norm and synchronised batch norm gain in detection (Wu and He, 2018, section 4.2).

    All four stages look at the image. Each map of the pyramid is a lateral 1x1
    convolution of a stage's map plus the coarser map, enlarged (nearest neighbour,
    which leaves the moments as they are), behind a 3x3 convolution; a fifth takes every
    second cell of the fourth, for proposals alone.

    Attributes are those of `MaskRCNN`, with `roi_state` ``"observe"`` or ``"none"``,
    one of the recipe's `anchor_sizes` for each of five maps, and:

    Attributes:
        pyramid_channels: of all maps of the pyramid, and of the heads' convolutions.
        hidden: of the dense layer in front of the box head.
        mask_roi_size: bins of RoIAlign for masks, along an axis.
        canonical_size: see `level_of`.

    Raises:
        ValueError: a setting that cannot be.
    """

    recipe: Recipe = dataclasses.field(default_factory=Recipe.fpn)
    pyramid_channels: int = 256
    hidden: int = 1024
    mask_roi_size: int = 14
    canonical_size: float = 224

    def __post_init__(self):
        if self.roi_state == "carry":
            raise ValueError(
                'roi_state is "carry", but crops come from several maps, each with a'
                ' state of its own; take "observe".'
            )
        if len(self.recipe.anchor_sizes) != 5:
            raise ValueError(
                f"anchor_sizes is {self.recipe.anchor_sizes}; expected five, one for"
                " each map of the pyramid."
            )
        super().__post_init__()

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the canvas for each cell, by map."""
        return tuple((4 if self.stem_pool else 2) * 2**level for level in range(5))

    @property
    def _anchor_sizes(self) -> list[tuple[float, ...]]:
        return [(size,) for size in self.recipe.anchor_sizes]

    def _maps(self, images: Signal, layers: Layers) -> list[Signal]:
        conv_norm = functools.partial(layers.conv_norm, features=self.pyramid_channels)
        above, maps = None, []
        stages = self._stages(images, layers, 4)
        for number in (4, 3, 2, 1):
            x = conv_norm(stages[number - 1], kernel_size=1, name=f"lateral{number}")
            above = x if above is None else x + _enlarged(above, like=x)
            maps.append(conv_norm(above, kernel_size=3, name=f"output{number}"))
        maps = maps[::-1]
        return [*maps, max_pool(maps[-1], (1, 1), strides=(2, 2))]

    def _looks(
        self, maps: list[Signal], size: jax.Array, layers: Layers
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        convolutions = functools.partial(Convolutions, layers, self.pyramid_channels)
        for_boxes = convolutions(name="box_convolutions")
        for_masks = convolutions(name="mask_convolutions")
        hidden = nn.Dense(self.hidden, dtype=self.dtype, name="box_hidden")

        def crops(boxes: jax.Array, used: jax.Array, output: int) -> Signal:
            levels = level_of(boxes, len(maps) - 1, self.canonical_size)
            align = functools.partial(
                roi_align_pyramid, strides=self.strides[:-1], output=output
            )
            values = [x.value for x in maps[:-1]]
            found = jax.vmap(align)(values, boxes, levels, size)
            return self._signal_of(found, used, None)

        def describe(boxes: jax.Array, used: jax.Array) -> tuple[jax.Array, None]:
            x = for_boxes(crops(boxes, used, self.recipe.roi_size)).value
            return nn.relu(hidden(x.reshape(*used.shape, -1))), None

        def outline(boxes: jax.Array, used: jax.Array) -> jax.Array:
            x = for_masks(crops(boxes, used, self.mask_roi_size)).value
            return x.reshape(*used.shape, *x.shape[1:])

        return describe, outline


def _enlarged(x: Signal, like: Signal) -> Signal:
    """Twice as high and wide; less a row or column where `like` has odd sizes."""
    count, height, width, channels = x.shape
    x = resize(x, (count, 2 * height, 2 * width, channels), "nearest")
    return x[:, : like.shape[1], : like.shape[2]]
