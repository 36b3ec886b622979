"""Mask R-CNN over Signals, with any normaliser."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kalman_flax._filter.observe import observe
from kalman_flax._filter.state import KalmanState, check_choice
from kalman_flax.layers.functions import global_avg_pool
from kalman_flax.layers.signal import Signal, as_signal
from kalman_flax.models.bottleneck_resnet import Bottleneck, stage, stem
from kalman_flax.models.detection.boxes import make_anchors
from kalman_flax.models.detection.heads import (
    BoxHead,
    MaskHead,
    detect,
    head_losses,
    mask_loss,
    own_masks,
    sample_rois,
)
from kalman_flax.models.detection.recipe import Detections, Recipe, Targets
from kalman_flax.models.detection.roi_align import roi_align
from kalman_flax.models.detection.rpn import RPNHead, propose, rpn_losses
from kalman_flax.models.network import Layers, Normalized

RoIState = Literal["observe", "carry", "none"]


class Parts(NamedTuple):
    """What a detector made of N images, and how it goes on to look at regions.

    Attributes:
        anchors: of each map, ``[A, 4]``.
        valid: which of them have their centre in the image, ``[N, A]`` for each map.
        objectness, deltas: of the region proposal network, ``[N, A]`` and ``[N, A, 4]``
            for each map.
        describe: maps boxes ``[N, R, 4]`` and which are used, ``[N, R]``, to what
            `box_head` takes, ``[N, R, D]``, and to what `outline` would give, or None
            where that is made of other crops.
        outline: maps the same to what `mask_head` takes, ``[N, R, h, w, C]``.
        box_head, mask_head: the last layers.
    """

    anchors: list[np.ndarray]
    valid: list[jax.Array]
    objectness: list[jax.Array]
    deltas: list[jax.Array]
    describe: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]]
    outline: Callable[[jax.Array, jax.Array], jax.Array]
    box_head: BoxHead
    mask_head: MaskHead


class MaskRCNN(Normalized):
    """Mask R-CNN (He et al., 2017) on the last map but one of a bottleneck ResNet: the
    C4 detector of the KN paper's Table 6.

    Stem and stages have the names and shapes that `BottleneckResNet` gives them, so
    that its checkpoints load by name. Stages 1 to 3 look at the image, and stage 4 at
    14x14 crops of their map. All images of one call share statistics, as all of one
    `BottleneckResNet` call do; `jax.vmap` over several such micro-batches. In the last
    stage, all regions of those images share them; what lies on the canvas beside an
    image, and slots without a region, do not count. The region proposal network and the
    two small heads have no normaliser.

    Convolutions and norms of frozen stages are those of inference: by running
    statistics, with no gradient. Behind them, and at each crop, the filter starts from
    what it observes: through frozen stages a prediction is never corrected, and crops
    have other moments than the map.

    Attributes are those of `Normalized`, and:

    Attributes:
        num_classes: without background.
        recipe: all settings but those of the network.
        stage_sizes, width, stride_in_1x1, stem_pool: as in `BottleneckResNet`.
        freeze_at: 0: nothing is frozen; 1: the stem; 2: the stem and stage 1, as
            detectors do that start from a classifier; and so on.
        roi_state: what the filter knows of crops: ``"observe"``, their moments,
            ``"carry"``, those of the map, or ``"none"``.

    Raises:
        ValueError: a setting that cannot be.
    """

    num_classes: int
    recipe: Recipe = Recipe()
    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    stride_in_1x1: bool = False
    stem_pool: bool = True
    freeze_at: int = 0
    roi_state: RoIState = "observe"

    def __post_init__(self):
        check_choice("roi_state", self.roi_state, get_args(RoIState))
        if len(self.stage_sizes) != 4:
            raise ValueError(
                f"stage_sizes is {self.stage_sizes}; expected the blocks of four"
                " stages, e.g. (3, 4, 6, 3) for ResNet-50."
            )
        if not 0 <= self.freeze_at <= 4:
            raise ValueError(
                f"freeze_at is {self.freeze_at}; expected 0 for nothing, 1 for the"
                " stem, and up to 4 for the stem and three stages."
            )
        super().__post_init__()

    def __call__(
        self, inputs: Mapping[str, jax.Array], use_running_average: bool
    ) -> Detections:
        """Finds objects.

        Args:
            inputs: ``image``, ``[N, H, W, 3]``, standardised, and zero outside of the
                valid part, which begins at the corner; ``size``, ``[N, 2]`` int32,
                height and width of that.
            use_running_average: True for inference by moving statistics (option A).
        """
        recipe, size = self.recipe, inputs["size"]
        parts = self._parts(inputs, use_running_average)
        proposals, used = self._propose(
            parts, size, recipe.candidates, recipe.proposals
        )
        vectors, _ = parts.describe(proposals, used)
        found = jax.vmap(functools.partial(detect, recipe=recipe))(
            *parts.box_head(vectors), proposals, used, size
        )
        masks = parts.mask_head(parts.outline(found.boxes, found.labels > 0))
        masks = jax.nn.sigmoid(jax.vmap(own_masks)(masks, found.labels))
        return found._replace(masks=masks)

    def losses(
        self,
        inputs: Mapping[str, jax.Array],
        targets: Targets,
        key: jax.Array,
        use_running_average: bool = False,
    ) -> dict[str, jax.Array]:
        """Returns what to make small, float32 ``[N]`` each: ``rpn_class``, ``rpn_box``,
        ``head_class``, ``head_box``, ``mask``, and their sum ``loss``.

        For ``network.apply(..., method="losses", mutable=["batch_stats"])``.

        Args:
            inputs: as in the call.
            targets: the objects.
            key: of the draws of anchors and proposals.
            use_running_average: False normalises as training does.
        """
        recipe, size = self.recipe, inputs["size"]
        parts = self._parts(inputs, use_running_average)
        proposals, used = self._propose(
            parts, size, recipe.candidates_training, recipe.proposals_training
        )
        keys = jax.random.split(key, (len(size), 2))
        rois = jax.vmap(functools.partial(sample_rois, recipe=recipe))(
            keys[:, 1], proposals, used, targets
        )
        vectors, outlines = parts.describe(rois.boxes, rois.used)
        first = slice(None), slice(recipe.roi_positives)
        if outlines is None:
            outlines = parts.outline(rois.boxes[first], rois.positive[first])
        masks = parts.mask_head(outlines[first])

        anchors = jnp.concatenate(parts.anchors)
        found = jax.vmap(
            lambda key, logits, deltas, targets, size: rpn_losses(
                key, logits, deltas, anchors, targets, size, recipe
            )
        )(
            keys[:, 0],
            jnp.concatenate(parts.objectness, axis=1),
            jnp.concatenate(parts.deltas, axis=1),
            targets,
            size,
        )
        found |= jax.vmap(functools.partial(head_losses, recipe=recipe))(
            *parts.box_head(vectors), rois, targets
        )
        found["mask"] = jax.vmap(mask_loss)(masks, rois, targets)
        return found | {"loss": functools.reduce(jnp.add, found.values())}

    @nn.compact
    def _parts(
        self, inputs: Mapping[str, jax.Array], use_running_average: bool
    ) -> Parts:
        """Makes all layers, which Flax wants of one method; both others go on."""
        recipe, size = self.recipe, inputs["size"]
        layers = self._layers(use_running_average)
        image = inputs["image"]
        valid = valid_cells(size, image.shape[1:3], stride=1)[..., None]
        maps = self._maps(Signal(image, self.input_state, valid), layers)
        describe, outline = self._looks(maps, size, layers)
        per_cell = len(self._anchor_sizes[0]) * len(recipe.anchor_ratios)
        rpn = RPNHead(recipe.rpn_channels, per_cell, self.dtype, name="rpn")
        objectness, deltas = rpn([x.value for x in maps])
        anchors, in_image = [], []
        for x, stride, sizes in zip(maps, self.strides, self._anchor_sizes):
            shape = x.shape[1:3]
            of_map = make_anchors(shape, stride, sizes, recipe.anchor_ratios)
            cells = valid_cells(size, shape, stride).reshape(size.shape[0], -1)
            anchors.append(of_map.reshape(-1, 4))
            in_image.append(jnp.repeat(cells, of_map.shape[2], axis=1))
        return Parts(
            anchors,
            in_image,
            objectness,
            deltas,
            describe,
            outline,
            BoxHead(self.num_classes, self.dtype, name="box_head"),
            MaskHead(
                self.num_classes, recipe.mask_channels, self.dtype, name="mask_head"
            ),
        )

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the canvas for each cell of a map."""
        return (16 if self.stem_pool else 8,)

    @property
    def _anchor_sizes(self) -> list[tuple[float, ...]]:
        """Those of each map."""
        return [self.recipe.anchor_sizes]

    def _propose(
        self, parts: Parts, size: jax.Array, candidates: int, count: int
    ) -> tuple[jax.Array, jax.Array]:
        """Boxes ``[N, P, 4]``, and which are used, ``[N, P]``."""

        def of_image(
            logits: list[jax.Array],
            deltas: list[jax.Array],
            valid: list[jax.Array],
            size: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            return propose(
                logits,
                deltas,
                parts.anchors,
                valid,
                size,
                candidates=candidates,
                count=count,
                overlap=self.recipe.proposal_overlap,
            )

        return jax.vmap(of_image)(parts.objectness, parts.deltas, parts.valid, size)

    def _stage(self, number: int, layers: Layers) -> list[Callable[[Signal], Signal]]:
        return stage(
            number,
            self.stage_sizes[number - 1],
            self.width,
            layers,
            block=self._block(Bottleneck),
            stride_in_1x1=self.stride_in_1x1,
        )

    def _maps(self, images: Signal, layers: Layers) -> list[Signal]:
        """What the region proposal network looks at: the map of stage 3."""
        return self._stages(images, layers, 3)[-1:]

    def _stages(self, x: Signal, layers: Layers, last: int) -> list[Signal]:
        """The maps of the stages up to the `last`."""
        maps = []
        for number in range(last + 1):
            frozen = number < self.freeze_at
            of = self._layers(use_running_average=True) if frozen else layers
            if number == 0:
                x = stem(x, self.width, of, pool=self.stem_pool)
            else:
                for block in self._stage(number, of):
                    x = block(x)
            if number == self.freeze_at - 1:
                value = lax.stop_gradient(x.value)
                x = x.replace(value=value, state=observe(value, mask=x.valid))
            maps.append(x)
        return maps[1:]

    def _looks(
        self, maps: list[Signal], size: jax.Array, layers: Layers
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """`Parts.describe` and `Parts.outline`: both look by the last stage."""
        blocks = self._stage(4, layers)

        def look(boxes: jax.Array, used: jax.Array) -> Signal:
            x = self._crops(maps[0], size, boxes, used)
            for block in blocks:
                x = block(x)
            return x

        def describe(boxes: jax.Array, used: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = look(boxes, used)
            apart = (*used.shape, *x.shape[1:])
            vectors = as_signal(global_avg_pool(x)).value
            return vectors.reshape(*used.shape, -1), x.value.reshape(apart)

        def outline(boxes: jax.Array, used: jax.Array) -> jax.Array:
            x = look(boxes, used)
            return x.value.reshape(*used.shape, *x.shape[1:])

        return describe, outline

    def _crops(
        self, x: Signal, size: jax.Array, boxes: jax.Array, used: jax.Array
    ) -> Signal:
        """Crops of the map, ``[N R, roi_size, roi_size, C]``."""
        (stride,) = self.strides
        align = functools.partial(roi_align, stride=stride, output=self.recipe.roi_size)
        crops = jax.vmap(align)(x.value, boxes, -(-size // stride))
        return self._signal_of(crops, used, x.state)

    def _signal_of(
        self, crops: jax.Array, used: jax.Array, state: KalmanState | None
    ) -> Signal:
        """Crops ``[N, R, h, w, C]`` of maps of that state, one after the other."""
        crops = crops.reshape(-1, *crops.shape[2:])
        valid = used.reshape(-1, 1, 1, 1)
        if self.roi_state == "observe":
            state = observe(crops, mask=valid)
        return Signal(crops, state if self.roi_state != "none" else None, valid)


def valid_cells(size: jax.Array, map_size: Sequence[int], stride: int) -> jax.Array:
    """Returns which cells of a map belong to the valid part of an image, ``[N, H, W]``.

    Args:
        size: height and width of the valid parts, ``[N, 2]``.
        map_size: H and W.
        stride: pixels for each cell.
    """
    rows, columns = (
        jnp.arange(cells) * stride < valid[:, None]
        for cells, valid in zip(map_size, (size[:, 0], size[:, 1]))
    )
    return rows[:, :, None] & columns[:, None, :]
