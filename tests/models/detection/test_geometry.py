"""Boxes, matching, suppression and RoIAlign, each against an independent answer.

`reference/make_torchvision_vectors.py` wrote what torchvision computes.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from kalman_flax.models.detection import boxes, fpn, matching, nms, roi_align

iou, encode, decode = map(jax.jit, (boxes.iou, boxes.encode, boxes.decode))
label_anchors = jax.jit(
    functools.partial(
        matching.label_anchors, positive=0.7, negative=0.3, crowd_overlap=0.7
    )
)

VECTORS = dict(np.load(pathlib.Path(__file__).parents[2] / "reference/torchvision.npz"))
KEY = jax.random.key(0)


def random_boxes(rng, count, limit=64):
    """Boxes of whole pixels, so that overlaps tie."""
    low = rng.integers(0, limit - 8, (count, 2))
    return np.concatenate([low, low + rng.integers(1, 24, (count, 2))], 1).clip(
        0, limit
    )


def overlap(a, b):
    """The IoU of two boxes, in float64."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - shared
    return shared / union if union > 0 else 0.0


def overlaps(first, second):
    return np.array([[overlap(a, b) for b in second] for a in first])


# Boxes


def test_anchors_are_those_of_torchvision_moved_by_half_a_cell():
    found = boxes.make_anchors((3, 5), 16, (32, 64, 128), (1.0,))
    assert found.shape == (3, 5, 3, 4)
    np.testing.assert_array_equal(found.reshape(-1, 4), VECTORS["anchors"] + 8)


def test_anchors_are_rounded_as_those_that_py_faster_rcnn_prints():
    # The table in its generate_anchors.py, of pixels counted from 1: corners included.
    table = """-83 -39 100 56  -175 -87 192 104  -359 -183 376 200
               -55 -55 72 72  -119 -119 136 136  -247 -247 264 264
               -35 -79 52 96  -79 -167 96 184  -167 -343 184 360"""
    expected = np.array(table.split(), float).reshape(9, 4) - [1, 1, 0, 0]
    found = boxes.make_anchors((1, 1), 16, (128, 256, 512), (0.5, 1, 2))
    np.testing.assert_array_equal(found[0, 0], expected)


def test_coder_is_that_of_torchvision_and_its_own_inverse():
    ours, anchors = VECTORS["boxes"], VECTORS["box_anchors"]
    deltas = encode(ours, anchors)
    np.testing.assert_allclose(deltas, VECTORS["deltas"], atol=2e-6)
    np.testing.assert_allclose(decode(deltas, anchors), ours, atol=1e-4)
    decoded = decode(VECTORS["far"], anchors)
    np.testing.assert_allclose(decoded, VECTORS["decoded"], rtol=1e-5, atol=1e-3)
    assert np.max(VECTORS["far"]) > boxes.MAX_LOG_SCALE  # some are clipped


def test_empty_boxes_are_finite():
    empty = jnp.zeros((1, 4))
    assert iou(empty, empty) == 0
    for encoded in (encode(empty, empty), encode(empty, empty + 3)):
        assert jnp.all(jnp.isfinite(encoded))


def test_iou_and_clip():
    rng = np.random.default_rng(0)
    first, second = random_boxes(rng, 12), random_boxes(rng, 9)
    found = iou(*map(jnp.float32, (first, second)))
    np.testing.assert_allclose(found, overlaps(first, second), atol=1e-6)
    clipped = boxes.clip(
        jnp.float32([[-3, -2, 50, 40], [5, 6, 7, 8]]), np.array([20, 30])
    )
    np.testing.assert_array_equal(clipped, [[0, 0, 30, 20], [5, 6, 7, 8]])


# Matching


def greedy_labels(anchors, objects, crowds, height, width):
    """tensorpack's order, by loops: 1, 0 or -1."""
    labels = np.full(len(anchors), -1)
    eligible = [
        a
        for a, (x1, y1, x2, y2) in enumerate(anchors)
        if x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height
    ]
    table = overlaps(anchors, objects)
    for g in range(len(objects)):
        most = max(table[a, g] for a in eligible)
        for a in eligible:
            if table[a, g] == most:
                labels[a] = 1
    for a in eligible:
        best = max(table[a])
        if best >= 0.7:
            labels[a] = 1
        if best < 0.3:
            labels[a] = 0
        if any(overlap(anchors[a], crowd) > 0.7 for crowd in crowds):
            labels[a] = -1
    return labels


@pytest.mark.parametrize("seed", range(4))
def test_labels_of_anchors(seed):
    rng = np.random.default_rng(seed)
    anchors = boxes.make_anchors((8, 8), 8, (12, 18, 26), (0.5, 1, 2)).reshape(-1, 4)
    objects = random_boxes(rng, 6)
    objects[0] = [3, 3, 6, 6]  # too small for any anchor
    objects[1] = objects[5] = anchors[300].round()  # an object, and a crowd over it
    slots = np.zeros((9, 4), np.float32)
    slots[[0, 2, 3, 4, 5, 7]] = objects
    valid, crowd = np.zeros((2, 9), bool)
    valid[[0, 2, 3, 4, 5]] = crowd[7] = True
    labels, matched = label_anchors(anchors, slots, valid, crowd, np.array([60, 64]))
    expected = greedy_labels(anchors, objects[:5], objects[5:], 60, 64)
    np.testing.assert_array_equal(labels, expected)
    assert {-1, 0, 1} == set(expected.tolist())
    table = overlaps(anchors, slots)
    table[:, ~valid] = -1
    np.testing.assert_allclose(
        np.take_along_axis(table, np.asarray(matched)[:, None], 1)[:, 0],
        table.max(1),
        atol=1e-6,
    )


def test_matches_are_those_of_torchvision_where_the_orders_agree():
    anchors, objects = VECTORS["candidates"], VECTORS["objects"]
    everywhere = np.full(len(objects), True)
    labels, matched = map(
        np.asarray,
        label_anchors(anchors, objects, everywhere, ~everywhere, np.array([200, 200])),
    )
    expected = VECTORS["matches"]
    # torchvision keeps the best anchors of an object also below the lower limit.
    kept = VECTORS["quality"].max(0) >= 0.3
    np.testing.assert_array_equal(
        np.minimum(expected, 0)[kept] + 1 == 1, labels[kept] == 1
    )
    np.testing.assert_array_equal(matched[expected >= 0], expected[expected >= 0])
    assert np.all(labels[~kept] == 0)


@pytest.mark.parametrize(
    "positives, negatives, expected",
    [
        (50, 200, (8, 24)),
        (3, 200, (3, 29)),
        (0, 200, (0, 32)),
        (50, 5, (8, 5)),
        (0, 0, (0, 0)),
    ],
)
def test_samples_are_counted_distinct_and_uniform(positives, negatives, expected):
    kind = np.zeros(300, int)
    kind[:positives], kind[positives : positives + negatives] = 1, 2
    kind = np.random.default_rng(0).permutation(kind)
    draw = functools.partial(
        matching.sample,
        positive=kind == 1,
        negative=kind == 2,
        count=32,
        most_positive=8,
    )
    index, is_positive, used = jax.vmap(draw)(jax.random.split(KEY, 500))
    assert np.all(is_positive.sum(1) == expected[0])
    assert np.all(used.sum(1) == sum(expected))
    assert not np.any(is_positive & ~used)
    for i, p, u in zip(
        np.asarray(index[:20]), np.asarray(is_positive), np.asarray(used)
    ):
        assert len(set(i[u])) == u.sum()
        assert np.all(kind[i[p]] == 1) and np.all(kind[i[u & ~p]] == 2)
        assert np.all(p[: p.sum()])  # the positive ones come first
    drawn = np.bincount(np.asarray(index)[np.asarray(is_positive)], minlength=300)
    if positives > 8:
        share = drawn[kind == 1] / 500  # 8 of 50 each, +- .016 (one sigma)
        assert np.all(np.abs(share - 8 / positives) < 0.08)


def test_fewer_boxes_than_slots():
    index, _, used = matching.sample(
        KEY, np.array([True, False]), np.array([False, True]), 9, 5
    )
    assert index.tolist() == [0, 1] and used.all()


# Non-maximum suppression


def greedy(candidates, scores, threshold):
    """Indices of what is kept, best first, by the loop that defines it."""
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if scores[i] > -np.inf and all(
            overlap(candidates[i], candidates[k]) <= threshold for k in kept
        ):
            kept.append(i)
    return kept


@functools.partial(jax.jit, static_argnames=("threshold", "count"))
def best(*args, threshold, count):
    return nms.best(*args[:2], threshold, count, *args[2:])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    used=st.integers(0, 40),
    duplicates=st.booleans(),
    levels=st.sampled_from([1, 5, 10**6]),
)
def test_suppression_is_greedy(seed, used, duplicates, levels):
    rng = np.random.default_rng(seed)
    candidates = random_boxes(rng, 40, 40).astype(np.float32)
    if duplicates:
        candidates[20:] = candidates[:20]
    scores = rng.integers(0, levels, 40).astype(np.float32)
    scores[rng.permutation(40)[used:]] = -np.inf
    expected = greedy(candidates, scores, 0.45)
    index, is_used = best(candidates, scores, threshold=0.45, count=40)
    assert np.asarray(index)[np.asarray(is_used)].tolist() == expected


@pytest.mark.parametrize("tile", [1, 7, 39, 40, 64])
def test_tiles_do_not_change_what_is_kept(tile, monkeypatch):
    monkeypatch.setattr(nms, "TILE", tile)
    rng = np.random.default_rng(1)
    candidates = random_boxes(rng, 40, 40).astype(np.float32)
    scores = rng.normal(size=40).astype(np.float32)
    kept = nms.suppress(candidates, scores, 0.3)
    assert set(np.flatnonzero(kept)) == set(greedy(candidates, scores, 0.3))
    assert 1 < kept.sum() < 40


def test_classes_do_not_suppress_each_other_and_counts_are_kept():
    rng = np.random.default_rng(2)
    candidates = random_boxes(rng, 40, 40).astype(np.float32)
    scores = rng.normal(size=40).astype(np.float32)
    classes = rng.integers(1, 4, 40)
    kept = [
        i
        for c in (1, 2, 3)
        for i in np.flatnonzero(classes == c)[
            greedy(candidates[classes == c], scores[classes == c], 0.3)
        ]
    ]
    expected = sorted(kept, key=lambda i: -scores[i])
    index, used = best(candidates, scores, classes, threshold=0.3, count=6)
    assert used.all() and index.tolist() == expected[:6]


# RoIAlign


def align(features, rois, output=5, size=None):
    size = np.array(size or features.shape[:2])
    return roi_align.roi_align(features, rois, size, stride=16, output=output)


def test_roi_align_and_its_gradient_are_those_of_torchvision(monkeypatch):
    monkeypatch.setattr(roi_align, "CHUNK", 4)  # of 9 boxes
    last = lambda x: np.moveaxis(x, -3, -1)  # noqa: E731
    pooled, pull = jax.vjp(
        lambda f: align(f, VECTORS["rois"]), last(VECTORS["features"])
    )
    np.testing.assert_allclose(pooled, last(VECTORS["pooled"]), atol=2e-5)
    (gradient,) = pull(jnp.asarray(last(VECTORS["cotangent"])))
    np.testing.assert_allclose(gradient, last(VECTORS["gradient"]), atol=2e-5)


def test_roi_align_sees_the_valid_part_alone_and_turns_with_the_image():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, 6, 2)).astype(np.float32)
    rois = np.float32([[0, 0, 96, 64], [10, 5, 90, 60], [80, 2, 96, 20]])
    padded = np.pad(features, ((0, 2), (0, 1), (0, 0)), constant_values=np.float32(99))
    pooled = align(features, rois)
    np.testing.assert_allclose(align(padded, rois, size=(4, 6)), pooled, atol=1e-5)
    flipped = rois[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + np.float32([96, 0, 96, 0])
    turned = align(features[:, ::-1], flipped.astype(np.float32))
    np.testing.assert_allclose(turned[:, :, ::-1], pooled, atol=1e-5)


def test_levels_are_those_of_torchvision():
    found = fpn.level_of(VECTORS["spread"], 4)
    np.testing.assert_array_equal(found + 2, VECTORS["levels"])
    assert set(VECTORS["levels"].tolist()) == {2, 3, 4, 5}


def test_on_a_pyramid_each_box_is_aligned_on_its_own_map():
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(n, n + 2, 3)).astype(np.float32) for n in (8, 4, 2)]
    rois = np.concatenate([random_boxes(rng, 9), [[0, 0, 0, 0]]]).astype(np.float32)
    levels, size = np.arange(10) % 3, np.array([61, 66])
    pyramid = functools.partial(
        fpn.roi_align_pyramid,
        boxes=rois,
        levels=levels,
        size=size,
        strides=(8, 16, 32),
        output=4,
    )

    def one_by_one(maps):
        found = [
            roi_align.roi_align(m, rois, -(-size // s), stride=s, output=4)
            for m, s in zip(maps, (8, 16, 32))
        ]
        return jnp.stack(found)[levels, np.arange(10)]

    cotangent = rng.normal(size=(10, 4, 4, 3)).astype(np.float32)
    found, expected = (
        jax.jit(lambda maps, f=f: (f(maps), jax.vjp(f, maps)[1](cotangent)))(maps)
        for f in (pyramid, one_by_one)
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected
    )


def test_masks_are_cropped_as_they_lie_in_the_image():
    mask = np.random.default_rng(0).random((32, 32), np.float32)
    image = np.pad(mask, ((4, 12), (8, 8)))
    box, roi = np.float32([8, 4, 40, 36]), np.float32([12, 0, 44, 20])
    found = roi_align.crop_masks(*(a[None] for a in (mask, box, roi)), 8)[0]
    centres = (np.arange(8) + 0.5) / 8
    pixels = np.meshgrid(20 * centres - 0.5, 12 + 32 * centres - 0.5, indexing="ij")
    expected = ndimage.map_coordinates(image, pixels, order=1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_mask_of_all_its_box_is_that_in_the_box_itself():
    boxes_, masks = (
        np.float32([[3, 5, 13, 9], [0, 0, 0, 0]]),
        np.ones((2, 7, 7), np.float32),
    )
    found = roi_align.crop_masks(masks, boxes_, boxes_, 5)
    np.testing.assert_allclose(found[0], 1)
    assert np.all(np.isfinite(found))
