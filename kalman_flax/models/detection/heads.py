"""What is said of each region of interest: its class, its box, its mask.

Functions are of one image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

from kalman_flax.models.detection.boxes import clip, decode, encode
from kalman_flax.models.detection.losses import binary_cross_entropy, huber, mean
from kalman_flax.models.detection.matching import match, sample
from kalman_flax.models.detection.nms import best
from kalman_flax.models.detection.recipe import Detections, Recipe, Targets
from kalman_flax.models.detection.roi_align import crop_masks
from kalman_flax.models.network import he_normal


class BoxHead(nn.Module):
    """Two dense layers side by side: logits of the classes, and a box for each class.

    Attributes:
        num_classes: without background.
        dtype: of the computation; outputs are float32.
    """

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps ``[..., C]`` to logits ``[..., 1 + num_classes]``, background first, and
        deltas ``[..., num_classes, 4]``, in units of the recipe's `box_weights`."""

        def dense(features: int, std: float, name: str) -> jax.Array:
            init = nn.initializers.normal(std)
            layer = nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)
            return layer(x).astype(jnp.float32)

        logits = dense(1 + self.num_classes, 0.01, "classes")
        deltas = dense(4 * self.num_classes, 0.001, "boxes")
        return logits, deltas.reshape(*x.shape[:-1], self.num_classes, 4)


class MaskHead(nn.Module):
    """2x2 transposed convolution of stride 2 and rectifier; a mask for each class.

    The last layer starts near 0, as in detectron2. tensorpack's starts with a variance
    of 2 / num_classes, which few classes make large.

    Attributes:
        num_classes: without background.
        channels: between the two.
        dtype: of the computation; outputs are float32.
    """

    num_classes: int
    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., H, W, C]`` to logits ``[..., 2 H, 2 W, num_classes]``."""
        upsample = nn.ConvTranspose(
            self.channels,
            (2, 2),
            strides=(2, 2),
            dtype=self.dtype,
            kernel_init=he_normal,
            name="upsample",
        )
        masks = nn.Conv(
            self.num_classes,
            (1, 1),
            dtype=self.dtype,
            kernel_init=nn.initializers.normal(0.001),
            name="masks",
        )
        return masks(nn.relu(upsample(x))).astype(jnp.float32)


class RoIs(NamedTuple):
    """Regions of one image to learn from, in R slots; the positive ones come first.

    Attributes:
        boxes: ``[R, 4]``.
        used: ``[R]`` bool.
        positive: ``[R]`` bool, which hold an object.
        objects: ``[R]`` int, index of that in the targets.
        labels: ``[R]`` int, its class; 0 is background.
    """

    boxes: jax.Array
    used: jax.Array
    positive: jax.Array
    objects: jax.Array
    labels: jax.Array


def sample_rois(
    key: PRNGKeyArray,
    proposals: Float[Array, "P 4"],
    used: Bool[Array, " P"],
    targets: Targets,
    recipe: Recipe,
) -> RoIs:
    """Draws regions to learn from among the proposals and the objects themselves."""
    boxes = lax.stop_gradient(jnp.concatenate([proposals, targets.boxes]))
    used = jnp.concatenate([used, targets.to_learn])
    _, objects, overlap = match(boxes, targets.boxes, targets.to_learn)
    is_object = overlap >= recipe.roi_positive
    index, positive, used = sample(
        key,
        used & is_object,
        used & ~is_object,
        recipe.roi_samples,
        recipe.roi_positives,
    )
    objects = objects[index]
    labels = jnp.where(positive, targets.labels[objects], 0)
    boxes = jnp.where(used[:, None], boxes[index], 0)
    return RoIs(boxes, used, positive, objects, labels)


def head_losses(
    logits: Float[Array, "R 1+K"],
    deltas: Float[Array, "R K 4"],
    rois: RoIs,
    targets: Targets,
    recipe: Recipe,
) -> dict[str, Float[Array, ""]]:
    """Returns ``head_class`` and ``head_box``: means over the used slots, of the
    cross-entropy, and of the Huber loss summed over the four numbers, to which
    background adds nothing."""
    entropy = -_at(jax.nn.log_softmax(logits), rois.labels)
    wanted = encode(targets.boxes[rois.objects], rois.boxes)
    wanted *= jnp.asarray(recipe.box_weights)
    found = jnp.take_along_axis(
        deltas, jnp.maximum(rois.labels - 1, 0)[:, None, None], axis=1
    )[:, 0]
    error = jnp.sum(huber(found - wanted, 1.0), axis=-1)
    return {
        "head_class": mean(entropy, rois.used),
        "head_box": mean(jnp.where(rois.positive, error, 0), rois.used),
    }


def mask_loss(
    logits: Float[Array, "P m m K"], rois: RoIs, targets: Targets
) -> Float[Array, ""]:
    """Returns the binary cross-entropy of the masks of the objects' own classes, a mean
    over pixels and positive slots, of which `logits` has the first P."""
    first = jax.tree.map(lambda leaf: leaf[: len(logits)], rois)
    masks = targets.masks[first.objects].astype(jnp.float32) / 255
    boxes = targets.boxes[first.objects]
    wanted = crop_masks(masks, boxes, first.boxes, logits.shape[1])
    entropy = binary_cross_entropy(own_masks(logits, first.labels), wanted)
    return mean(jnp.mean(entropy, axis=(1, 2)), first.positive)


def own_masks(
    logits: Float[Array, "R m m K"], labels: Int[Array, " R"]
) -> Float[Array, "R m m"]:
    """Returns the mask of each region's own class; of empty slots, of any."""
    return _at(logits, jnp.maximum(labels - 1, 0)[:, None, None])


def _at(values: Float[Array, "*B K"], index: Int[Array, "*#B"]) -> Float[Array, "*B"]:
    index = jnp.broadcast_to(index, values.shape[:-1])
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def detect(
    logits: Float[Array, "P 1+K"],
    deltas: Float[Array, "P K 4"],
    proposals: Float[Array, "P 4"],
    used: Bool[Array, " P"],
    size: Num[Array, " 2"],
    recipe: Recipe,
) -> Detections:
    """Returns what the box head found, without masks: scores above the limit, non-
    maximum suppression class by class, and the best of what is left."""
    classes = deltas.shape[1]
    scores = jax.nn.softmax(logits)[:, 1:]
    scores = jnp.where(used[:, None] & (scores > recipe.min_score), scores, -jnp.inf)
    score, flat = lax.top_k(
        scores.reshape(-1), min(recipe.detection_candidates, scores.size)
    )
    region, label = flat // classes, flat % classes
    delta = deltas[region, label] / jnp.asarray(recipe.box_weights)
    box = clip(decode(delta, proposals[region]), size)
    index, kept = best(
        box, score, recipe.detection_overlap, recipe.detections, groups=label
    )
    return Detections(
        boxes=jnp.where(kept[:, None], box[index], 0),
        scores=jnp.where(kept, score[index], 0),
        labels=jnp.where(kept, label[index] + 1, 0).astype(jnp.int32),
        masks=jnp.zeros((len(index), 0, 0)),
    )
