"""The region proposal network: where in an image something may be.

Ren et al. (2015, "Faster R-CNN"). It has no normaliser. Functions are of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

from kalman_flax.models.detection.boxes import area, clip, decode, encode
from kalman_flax.models.detection.losses import binary_cross_entropy, huber, mean
from kalman_flax.models.detection.matching import label_anchors, sample
from kalman_flax.models.detection.nms import best
from kalman_flax.models.detection.recipe import Recipe, Targets

#: where the loss of a box turns from quadratic to linear, and what it is divided by
_DELTA = 1 / 9


class RPNHead(nn.Module):
    """3x3 convolution and rectifier; an objectness and a box of each anchor.

    Attributes:
        channels: of the 3x3 convolution.
        anchors: in each cell, A.
        dtype: of the computation; outputs are float32.
    """

    channels: int
    anchors: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, maps: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Looks at each map ``[N, H, W, C]`` alike.

        Returns:
            logits: of objectness, ``[N, H W A]`` for each map.
            deltas: as of `decode`, ``[N, H W A, 4]``.
        """

        def conv(features: int, size: int, name: str) -> nn.Conv:
            return nn.Conv(
                features,
                (size, size),
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(0.01),
                name=name,
            )

        shared = conv(self.channels, 3, "conv")
        objectness = conv(self.anchors, 1, "objectness")
        box = conv(4 * self.anchors, 1, "box")
        logits, deltas = [], []
        for features in maps:
            x = nn.relu(shared(features))
            count = x.shape[0]  # it may be a symbol, for `jax.export`
            logits.append(objectness(x).reshape(count, -1).astype(jnp.float32))
            deltas.append(box(x).reshape(count, -1, 4).astype(jnp.float32))
        return logits, deltas


def propose(
    logits: Sequence[Float[Array, " A"]],
    deltas: Sequence[Float[Array, "A 4"]],
    anchors: Sequence[np.ndarray],
    valid: Sequence[Bool[Array, " A"]],
    size: Num[Array, " 2"],
    *,
    candidates: int,
    count: int,
    overlap: float,
) -> tuple[Float[Array, "P 4"], Bool[Array, " P"]]:
    """Returns the boxes most likely to hold something, best first; no gradient.

    Args:
        logits, deltas, anchors, valid: of each map. Anchors that are not valid, behind
            the border of the image, propose nothing.
        size: height and width of the valid part of the canvas.
        candidates: at most so many anchors of a map.
        count: slots to fill, P; with fewer candidates than that, one for each.
        overlap: IoU above which one suppresses another of its map.

    Returns:
        boxes, clipped to the image, and which slots are used.
    """
    boxes, scores, maps = [], [], []
    for number, of_map in enumerate(zip(logits, deltas, anchors, valid)):
        logit, delta, anchor, eligible = of_map
        score, index = lax.top_k(
            jnp.where(eligible, lax.stop_gradient(logit), -jnp.inf),
            min(candidates, logit.size),
        )
        box = decode(lax.stop_gradient(delta)[index], jnp.asarray(anchor)[index])
        boxes.append(clip(box, size))
        scores.append(score)
        maps.append(jnp.full(score.shape, number))
    box, score = jnp.concatenate(boxes), jnp.concatenate(scores)
    score = jnp.where(area(box) > 0, score, -jnp.inf)
    groups = jnp.concatenate(maps) if len(maps) > 1 else None
    index, used = best(box, score, overlap, count, groups)
    return jnp.where(used[:, None], box[index], 0), used


def rpn_losses(
    key: PRNGKeyArray,
    logits: Float[Array, " A"],
    deltas: Float[Array, "A 4"],
    anchors: Float[Array, "A 4"],
    targets: Targets,
    size: Int[Array, " 2"],
    recipe: Recipe,
) -> dict[str, Float[Array, ""]]:
    """Returns ``rpn_class`` and ``rpn_box``.

    The cross-entropy is a mean over the anchors that were drawn; so is, in effect, the
    Huber loss of boxes, but over the four numbers it is a sum, and anchors that are
    background add nothing. Both are 0 for an image without anchors of both kinds, which
    tensorpack leaves out of training.

    Args:
        key: of the draw of anchors.
        logits, deltas, anchors: of all maps, one after the other.
        targets: of this image.
        size: height and width of the valid part of the canvas.
        recipe: the settings.
    """
    labels, matched = label_anchors(
        anchors,
        targets.boxes,
        targets.to_learn,
        targets.crowds,
        size,
        positive=recipe.rpn_positive,
        negative=recipe.rpn_negative,
        crowd_overlap=recipe.crowd_overlap,
    )
    index, positive, used = sample(
        key, labels == 1, labels == 0, recipe.rpn_samples, recipe.rpn_positives
    )
    used &= jnp.any(positive) & jnp.any(used & ~positive)
    entropy = binary_cross_entropy(logits[index], positive.astype(jnp.float32))
    wanted = encode(targets.boxes[matched[index]], anchors[index])
    error = jnp.sum(huber(deltas[index] - wanted, _DELTA), axis=-1) / _DELTA
    return {
        "rpn_class": mean(entropy, used),
        "rpn_box": mean(jnp.where(positive, error, 0), used),
    }
