"""Which objects the anchors and proposals of one image stand for, and a sample."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray

from kalman_flax.models.detection.boxes import inside, iou


def match(
    boxes: Float[Array, "B 4"], objects: Float[Array, "G 4"], valid: Bool[Array, " G"]
) -> tuple[Float[Array, "B G"], Int[Array, " B"], Float[Array, " B"]]:
    """Returns all overlaps, and for each box its best object and their IoU.

    Overlaps with objects that are not `valid` are -1.
    """
    overlaps = jnp.where(valid, iou(boxes, objects), -1)
    return overlaps, jnp.argmax(overlaps, axis=1), jnp.max(overlaps, axis=1)


def label_anchors(
    anchors: Float[Array, "A 4"],
    objects: Float[Array, "G 4"],
    valid: Bool[Array, " G"],
    crowd: Bool[Array, " G"],
    size: Num[Array, " 2"],
    *,
    positive: float,
    negative: float,
    crowd_overlap: float,
) -> tuple[Int[Array, " A"], Int[Array, " A"]]:
    """Labels anchors as tensorpack does, in its order, where the later overwrites.

    1. The anchors that overlap an object most are positive, all of equal ones.
    2. So are those whose IoU with some object is at least `positive`.
    3. Those whose best IoU is below `negative` are negative: an object that no anchor
       overlaps by as much has no positive anchor.
    4. Anchors whose IoU with a crowd is above `crowd_overlap` are ignored, as are all
       that no line names, and those not wholly inside the image.

    Args:
        anchors: of the image.
        objects: x1, y1, x2, y2; padded by slots.
        valid: which slots hold an object to learn.
        crowd: which hold a crowd.
        size: height and width of the valid part of the canvas.
        positive, negative, crowd_overlap: limits of the IoU.

    Returns:
        labels: 1 positive, 0 negative, -1 ignored.
        matched: index of the object that each overlaps most.
    """
    eligible = inside(anchors, size)
    overlaps, matched, best = match(anchors, objects, valid)
    overlaps = jnp.where(eligible[:, None], overlaps, -1)
    most = jnp.max(overlaps, axis=0)
    is_most = jnp.any((overlaps == most) & valid, axis=1)
    labels = jnp.where(is_most | (best >= positive), 1, -1)
    labels = jnp.where(best < negative, 0, labels)
    over_crowd = match(anchors, objects, crowd)[2] > crowd_overlap
    return jnp.where(eligible & ~over_crowd, labels, -1), matched


def sample(
    key: PRNGKeyArray,
    positive: Bool[Array, " B"],
    negative: Bool[Array, " B"],
    count: int,
    most_positive: int,
) -> tuple[Int[Array, " K"], Bool[Array, " K"], Bool[Array, " K"]]:
    """Draws boxes to learn from, uniformly and without replacement.

    At most `most_positive` positive ones come first, and then as many negative ones as
    there are, up to `count` in all.

    Args:
        key: of the draw.
        positive, negative: which boxes may be drawn as what.
        count: number of slots, K; with fewer boxes than that, one for each.
        most_positive: at most so many are positive.

    Returns:
        index: of the boxes.
        is_positive: which slots hold a positive one; they are the first.
        used: which slots hold one at all.
    """
    count = min(count, positive.size)
    noise = jax.random.uniform(key, positive.shape)

    def draw(among: Bool[Array, " B"], slots: int) -> tuple[jax.Array, jax.Array]:
        noisy, index = lax.top_k(jnp.where(among, noise, -1), slots)
        return index, noisy >= 0

    first, is_positive = draw(positive, min(most_positive, count))
    second, is_negative = draw(negative, count)
    left = count - jnp.sum(is_positive)
    is_negative &= jnp.arange(count) < left
    used = jnp.concatenate([is_positive, is_negative])
    order = jnp.argsort(~used, stable=True)[:count]
    index = jnp.concatenate([first, second])[order]
    used = used[order]
    return index, used & (jnp.arange(count) < jnp.sum(is_positive)), used
