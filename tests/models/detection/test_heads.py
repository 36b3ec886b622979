"""Proposals, losses and detections of one image, against loops in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kalman_flax.models.detection import Recipe, Targets, boxes, heads, rpn
from kalman_flax.models.detection.heads import RoIs
from tests.models.detection.test_geometry import (
    greedy,
    greedy_labels,
    overlaps,
    random_boxes,
)

rpn_losses = jax.jit(rpn.rpn_losses, static_argnames="recipe")
propose = jax.jit(rpn.propose, static_argnames=("candidates", "count", "overlap"))
sample_rois = jax.jit(heads.sample_rois, static_argnames="recipe")
head_losses = jax.jit(heads.head_losses, static_argnames="recipe")
mask_loss = jax.jit(heads.mask_loss)
detect = jax.jit(heads.detect, static_argnames="recipe")

KEY = jax.random.key(0)
SIZE = np.array([60, 64])
ANCHORS = boxes.make_anchors((8, 8), 8, (12, 26), (0.5, 1, 2)).reshape(-1, 4)
#: every anchor and every proposal is drawn
ALL = dataclasses.replace(
    Recipe.small(),
    rpn_positive=0.7,  # as of `greedy_labels`
    rpn_samples=1000,
    rpn_positives=1000,
    roi_samples=1000,
    roi_positives=1000,
)
RNG = np.random.default_rng(0)
OBJECTS = np.float32([[9, 8, 33, 36], [36, 20, 62, 41], [1, 44, 15, 58]])
CROWD = np.float32([[40, 40, 64, 60]])
#: an empty slot among them
TARGETS = Targets(
    boxes=jnp.asarray(
        np.concatenate([OBJECTS[:2], np.zeros((1, 4)), OBJECTS[2:], CROWD]), jnp.float32
    ),
    labels=jnp.array([2, 1, 0, 3, 1]),
    crowd=jnp.array([False, False, False, False, True]),
    masks=jnp.asarray(RNG.integers(0, 256, (5, 6, 6)), jnp.uint8),
)
LABELS = np.array([2, 1, 3])  # of OBJECTS
SLOTS = np.array([0, 1, 3])  # of OBJECTS


def code(wanted, anchor):
    """Girshick et al. (2014), appendix C, in float64."""
    wanted, anchor = np.float64(wanted), np.float64(anchor)
    side, anchor_side = wanted[2:] - wanted[:2], anchor[2:] - anchor[:2]
    offset = (wanted[:2] + wanted[2:] - anchor[:2] - anchor[2:]) / 2 / anchor_side
    return np.concatenate([offset, np.log(side / anchor_side)])


def smooth(error, delta):
    error = abs(error)
    return error**2 / 2 if error <= delta else delta * (error - delta / 2)


def entropy(logit, target):
    p = 1 / (1 + np.exp(-np.float64(logit)))
    return -target * np.log(p) - (1 - target) * np.log(1 - p)


def test_losses_of_proposals():
    logits = RNG.normal(size=len(ANCHORS)).astype(np.float32)
    deltas = RNG.normal(size=(len(ANCHORS), 4)).astype(np.float32) / 4
    labels = greedy_labels(ANCHORS, OBJECTS, CROWD, *SIZE)
    table = overlaps(ANCHORS, OBJECTS)
    drawn = [a for a in range(len(ANCHORS)) if labels[a] >= 0]
    of_class = np.mean([entropy(logits[a], labels[a]) for a in drawn])
    of_box = sum(
        smooth(error, 1 / 9) * 9
        for a in drawn
        if labels[a]
        for error in deltas[a] - code(OBJECTS[table[a].argmax()], ANCHORS[a])
    ) / len(drawn)
    found = rpn_losses(KEY, logits, deltas, ANCHORS, TARGETS, SIZE, ALL)
    np.testing.assert_allclose(found["rpn_class"], of_class, rtol=1e-5)
    np.testing.assert_allclose(found["rpn_box"], of_box, rtol=1e-5)

    # With what it asks for there is nothing left to lose.
    logits = np.where(labels == 1, 50.0, -50.0).astype(np.float32)
    deltas = [code(OBJECTS[row.argmax()], a) for row, a in zip(table, ANCHORS)]
    found = rpn_losses(
        KEY, logits, jnp.float32(np.stack(deltas)), ANCHORS, TARGETS, SIZE, ALL
    )
    assert max(found.values()) < 1e-6

    # No objects, as in an image of nothing but a crowd: no loss.
    empty = TARGETS._replace(crowd=TARGETS.labels > 0)
    found = rpn_losses(
        KEY, logits, deltas[0] + logits[:, None] * 0, ANCHORS, empty, SIZE, ALL
    )
    assert max(found.values()) == 0


def test_regions_to_learn_from():
    proposals = np.concatenate([OBJECTS + 1, random_boxes(RNG, 20)]).astype(np.float32)
    used = np.arange(len(proposals)) < 20
    rois = sample_rois(KEY, proposals, used, TARGETS, ALL)
    candidates = np.concatenate([proposals, TARGETS.boxes])
    expected = {}
    for i, box in enumerate(candidates):
        row = overlaps([box], OBJECTS)[0]
        if i < 20 or i - len(proposals) in SLOTS:
            best = row.argmax()
            expected[tuple(box)] = LABELS[best] if row[best] >= 0.5 else 0
    slots = np.flatnonzero(rois.used)
    found = {tuple(np.asarray(rois.boxes[i])): int(rois.labels[i]) for i in slots}
    assert found == expected
    assert np.array_equal(rois.positive, rois.labels > 0)
    for i in np.flatnonzero(rois.positive):
        assert rois.labels[i] == TARGETS.labels[rois.objects[i]]


def rois_of(boxes_, labels, objects, used):
    labels = jnp.asarray(labels)
    return RoIs(
        jnp.float32(boxes_), jnp.asarray(used), labels > 0, jnp.asarray(objects), labels
    )


def test_losses_of_heads():
    regions = np.concatenate([OBJECTS + 2, random_boxes(RNG, 5)]).astype(np.float32)
    labels, objects = (
        np.array([*LABELS, 0, 0, 0, 0, 0]),
        np.array([*SLOTS, 0, 0, 1, 1, 0]),
    )
    used = np.arange(8) < 6
    rois = rois_of(regions, labels, objects, used)
    logits = RNG.normal(size=(8, 4)).astype(np.float32)
    deltas = RNG.normal(size=(8, 3, 4)).astype(np.float32)
    p = np.exp(np.float64(logits))
    p /= p.sum(1, keepdims=True)
    of_class = -np.mean([np.log(p[r, labels[r]]) for r in range(6)])
    of_box = 0
    for r in range(3):
        wanted = code(OBJECTS[r], regions[r]) * [10, 10, 5, 5]
        of_box += sum(smooth(e, 1.0) for e in deltas[r, labels[r] - 1] - wanted) / 6
    found = head_losses(logits, deltas, rois, TARGETS, ALL)
    np.testing.assert_allclose(found["head_class"], of_class, rtol=1e-5)
    np.testing.assert_allclose(found["head_box"], of_box, rtol=1e-5)


def test_loss_of_masks():
    # Over the objects' own boxes, at their own size, masks need no resampling.
    rois = rois_of(
        np.concatenate([OBJECTS, np.zeros((5, 4))]),
        np.array([*LABELS, 0, 0, 0, 0, 0]),
        np.array([*SLOTS, 0, 0, 0, 0, 0]),
        np.arange(8) < 3,
    )
    logits = RNG.normal(size=(4, 6, 6, 3)).astype(np.float32)
    masks = np.float64(TARGETS.masks)[SLOTS] / 255
    expected = np.mean(
        [entropy(logits[r, ..., LABELS[r] - 1], masks[r]) for r in range(3)]
    )
    np.testing.assert_allclose(mask_loss(logits, rois, TARGETS), expected, rtol=1e-5)
    hard = TARGETS._replace(masks=jnp.where(TARGETS.masks > 127, 255, 0))
    logits = np.zeros((4, 6, 6, 3), np.float32)
    for r in range(3):
        logits[r, ..., LABELS[r] - 1] = np.where(hard.masks[SLOTS[r]] > 0, 50, -50)
    assert mask_loss(logits, rois, hard) < 1e-4


def test_proposals_are_the_best_of_each_map():
    maps = [ANCHORS[:200], ANCHORS[200:]]
    logits = [RNG.normal(size=len(m)).astype(np.float32) for m in maps]
    deltas = [RNG.normal(size=(len(m), 4)).astype(np.float32) / 3 for m in maps]
    valid = [RNG.random(len(m)) < 0.8 for m in maps]
    kept = []
    for anchor, logit, delta, eligible in zip(maps, logits, deltas, valid):
        score = np.where(eligible, logit, -np.inf)
        first = np.argsort(-score, kind="stable")[:50]
        box = np.asarray(boxes.decode(delta, anchor)).clip(0, [64, 60, 64, 60])[first]
        score = np.where((box[:, 2:] > box[:, :2]).all(1), score[first], -np.inf)
        kept += [(-score[i], *box[i]) for i in greedy(box, score, 0.7)]
    expected = np.array(sorted(kept))[:30, 1:]
    found, used = propose(
        logits, deltas, maps, valid, SIZE, candidates=50, count=30, overlap=0.7
    )
    assert used.all()
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("detections", [4, 40])
def test_detections(detections):
    recipe = dataclasses.replace(ALL, detections=detections, min_score=0.3)
    proposals = random_boxes(RNG, 20).astype(np.float32)
    used = np.arange(20) < 17
    logits = RNG.normal(size=(20, 4)).astype(np.float32)
    deltas = RNG.normal(size=(20, 3, 4)).astype(np.float32)
    p = np.exp(np.float64(logits))
    p /= p.sum(1, keepdims=True)
    expected = []
    for label in (1, 2, 3):
        of_class = deltas[:, label - 1] / np.float32([10, 10, 5, 5])
        box = np.asarray(boxes.decode(of_class, proposals)).clip(0, [64, 60, 64, 60])
        score = np.where(used & (p[:, label] > 0.3), p[:, label], -np.inf)
        expected += [(score[i], label, *box[i]) for i in greedy(box, score, 0.5)]
    expected = np.array(sorted(expected, reverse=True))[:detections]
    found = detect(logits, deltas, proposals, used, SIZE, recipe)
    count = len(expected)
    assert count >= 4 and found.scores.shape == (detections,)
    np.testing.assert_allclose(found.scores[:count], expected[:, 0], rtol=1e-5)
    np.testing.assert_array_equal(found.labels[:count], expected[:, 1])
    np.testing.assert_allclose(found.boxes[:count], expected[:, 2:], atol=1e-4)
    assert not np.any(found.labels[count:]) and not np.any(found.boxes[count:])
