"""The whole detector, at one tiny shape: what it shares with classifiers, that it
learns, and what it leaves alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax._filter import convolution
from kalman_flax.models.detection import (
    Detections,
    MaskRCNN,
    MaskRCNNFPN,
    Recipe,
    Targets,
    boxes,
    fpn,
    mask_rcnn,
)
from tests.layers.test_valid import no_border

KEY = jax.random.key(0)
TINY = dataclasses.replace(
    Recipe.small(),
    anchor_sizes=(16, 28),
    rpn_channels=8,
    rpn_samples=32,
    rpn_positives=8,
    candidates_training=48,
    candidates=48,
    proposals_training=24,
    proposals=16,
    roi_samples=16,
    roi_positives=4,
    mask_channels=8,
    detections=6,
)
SMALL = {"stage_sizes": (1, 1, 1, 1), "width": 8, "stem_pool": False}


#: what the pyramid is told besides
PYRAMID = {
    "recipe": dataclasses.replace(TINY, anchor_sizes=(8, 16, 28, 40, 60), roi_size=4),
    "pyramid_channels": 8,
    "hidden": 16,
    "mask_roi_size": 6,
    "canonical_size": 28,
}


def build(name, pyramid=False, normalizer=None, **options):
    kind, more = (MaskRCNNFPN, PYRAMID) if pyramid else (MaskRCNN, {"recipe": TINY})
    normalization = kf.normalization(name, **(normalizer or {}))
    return kind(3, **SMALL, **more, **normalization._asdict(), **options)


def scene():
    """Two bright squares on noise, one with a hole: inputs and targets of one image."""
    rng = np.random.default_rng(0)
    image = 0.1 * rng.normal(size=(1, 64, 64, 3))
    image[:, 12:36, 10:34] += 2
    image[:, 40:60, 36:60] -= 2
    image[:, 46:54, 42:54] = 0
    masks = np.full((1, 3, 8, 8), 255, np.uint8)
    masks[:, 1, 2:6, 2:6] = 0
    targets = Targets(
        jnp.float32([[[10, 12, 34, 36], [36, 40, 60, 60], [0, 0, 0, 0]]]),
        jnp.array([[1, 3, 0]]),
        jnp.zeros((1, 3), bool),
        jnp.asarray(masks),
    )
    return {"image": jnp.float32(image), "size": jnp.array([[64, 64]])}, targets


INPUTS, TARGETS = scene()


@functools.cache
def initialised(name, pyramid=False):
    """Variables; what is frozen makes no difference to them."""
    init = jax.jit(build(name, pyramid).init, static_argnums=2)
    return init(KEY, INPUTS, True)


def filled(net, inputs=INPUTS):
    """Variables of random numbers, of the size that training gives them. Initialising
    takes as long as a test."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape)
        found = {
            "kernel": noise * (2 / max(1, np.prod(leaf.shape[:-1]))) ** 0.5,
            "bias": 0.1 * noise,
            "mean": 0.1 * noise,
            "scale": np.exp(0.2 * noise),
            "var": np.exp(0.2 * noise),
        }.get(path[-1].key, np.zeros(leaf.shape))
        return found.astype(leaf.dtype)

    shapes = jax.eval_shape(lambda: net.init(KEY, inputs, True))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def learn(net, params, stats, inputs=INPUTS, targets=TARGETS, key=KEY):
    losses, written = net.apply(
        {"params": params, "batch_stats": stats},
        inputs,
        targets,
        key,
        method="losses",
        mutable=["batch_stats"],
    )
    return jnp.mean(losses["loss"]), (losses, written.get("batch_stats", {}))


def test_checkpoints_of_the_classifier_fit():
    variables = jax.eval_shape(lambda: build("batch").init(KEY, INPUTS, True))
    classifier = kf.models.BottleneckResNet(
        10, **SMALL, **kf.normalization("batch")._asdict()
    )
    expected = jax.eval_shape(lambda: classifier.init(KEY, INPUTS["image"], True))
    heads = {"rpn", "box_head", "mask_head"}
    assert variables["params"].keys() - expected["params"].keys() == heads
    assert expected["params"].keys() - variables["params"].keys() == {"head"}
    for collection, tree in expected.items():
        for name in tree.keys() - {"head"}:
            found = jax.tree.map(jnp.shape, variables[collection][name])
            assert found == jax.tree.map(jnp.shape, tree[name])


@pytest.mark.slow
def test_the_recipe_is_that_of_resnet50():
    inputs = {"image": jnp.zeros((1, 256, 320, 3)), "size": jnp.array([[250, 320]])}
    norm = kf.baselines.FrozenBatchNorm
    net = MaskRCNN(80, norm=norm, freeze_at=2)
    found, variables = jax.eval_shape(lambda: net.init_with_output(KEY, inputs, True))
    expected = Detections((1, 100, 4), (1, 100), (1, 100), (1, 100, 14, 14))
    assert jax.tree.map(lambda x: x.shape, found) == expected
    assert "stage3_block6" in variables["params"]
    params = jax.tree.map(jnp.shape, variables["params"])
    assert params["rpn"]["conv"]["kernel"] == (3, 3, 1024, 1024)
    assert params["rpn"]["box"]["kernel"] == (1, 1, 1024, 60)
    assert params["box_head"]["boxes"]["kernel"] == (2048, 320)
    assert params["mask_head"]["upsample"]["kernel"] == (2, 2, 2048, 256)


@pytest.mark.slow  # beside the parts in test_heads.py
@pytest.mark.parametrize(
    "name, pyramid",
    [("batch", False), ("kalman", False), ("group", False), ("kalman", True)],
)
def test_ten_steps_learn_and_leave_alone_what_is_frozen(name, pyramid):
    net = build(name, pyramid, freeze_at=2)
    variables = initialised(name, pyramid)
    params, stats = variables["params"], variables.get("batch_stats", {})

    @jax.jit
    def step(params, stats):
        grad = jax.value_and_grad(functools.partial(learn, net), has_aux=True)
        (_, (losses, stats)), gradient = grad(params, stats)
        params = jax.tree.map(lambda p, g: p - 0.03 * g, params, gradient)
        return params, stats, losses, gradient

    first = None
    for _ in range(10):
        params, stats, losses, gradient = step(params, stats)
        first = first or losses
    assert all(
        loss.shape == (1,) and loss.dtype == jnp.float32 for loss in losses.values()
    )
    parts = {"rpn_class", "rpn_box", "head_class", "head_box", "mask"}
    assert losses.keys() == parts | {"loss"}
    np.testing.assert_allclose(losses["loss"], sum(losses[p] for p in parts), rtol=1e-6)
    assert losses["loss"] < 0.9 * first["loss"]
    for part in ("rpn_class", "head_class", "mask"):
        assert losses[part] < first[part], part
    for block in ("stem", "stem_norm", "stage1_block1"):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient[block]))
        old = variables.get("batch_stats", {}).get(block, {})
        assert jax.tree.all(jax.tree.map(np.array_equal, stats.get(block, {}), old))
    # Of the coarsest map few anchors lie in the image, and none may be drawn.
    frozen_or_idle = {"stem", "stem_norm", "stage1_block1", "output4", "output4_norm"}
    for block in params.keys() - frozen_or_idle:
        assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient[block])), block


def loud(align):
    """The same, but empty slots get crops that no statistic could overlook."""

    def wrapped(maps, rois, *args, **kwargs):
        empty = boxes.area(rois)[:, None, None, None] == 0
        return jnp.where(empty, 1e3, align(maps, rois, *args, **kwargs))

    return wrapped


#: every anchor, every proposal and every object is drawn, on canvases of any size
ALL = dict(rpn_samples=9999, rpn_positives=9999, roi_samples=99, roi_positives=99)


@pytest.mark.parametrize(
    "name, pyramid, what",
    [
        ("kalman", False, "losses"),
        pytest.param("batch", False, "detections", marks=pytest.mark.slow),
        pytest.param("frozen_batch", False, "detections", marks=pytest.mark.slow),
        pytest.param("group", True, "detections", marks=pytest.mark.slow),
        pytest.param("batch", True, "detections", marks=pytest.mark.slow),
        pytest.param("kalman", True, "losses", marks=pytest.mark.slow),
    ],
)
def test_a_padded_canvas_and_empty_slots_change_nothing(
    name, pyramid, what, monkeypatch
):
    """Nor what is written to the running statistics. The share of the border, which KN
    has of the canvas, is left out: `tests/layers/test_valid.py` has a test of that."""
    monkeypatch.setattr(convolution, "_over_positions", no_border)
    net = build(name, pyramid)
    # More slots than suppression leaves proposals for.
    more = {"proposals": 48, **(ALL if what == "losses" else {})}
    net = net.clone(recipe=dataclasses.replace(net.recipe, **more))
    variables = filled(net)
    size = jnp.array([[50, 57]])
    image = INPUTS["image"][:, :50, :57]
    padded = jnp.pad(image, ((0, 0), (0, 14), (0, 7), (0, 0)))
    options = {"use_running_average": False, "mutable": ["batch_stats"]}

    @jax.jit
    def run(image):
        inputs = {"image": image, "size": size}
        if what == "losses":
            options["method"] = "losses"
            return net.apply(variables, inputs, TARGETS, KEY, **options)
        return net.apply(variables, inputs, **options)

    expected, stats = run(image)
    for module, align in ((mask_rcnn, "roi_align"), (fpn, "roi_align_pyramid")):
        monkeypatch.setattr(module, align, loud(getattr(module, align)))
    found, padded_stats = run(padded)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    if what == "losses":
        assert all(loss > 0 for loss in expected.values())
    else:
        assert np.all(expected.labels > 0)
        np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
        found, expected = (each._replace(boxes=0) for each in (found, expected))
    jax.tree.map(close, (found, padded_stats), (expected, stats))


def test_the_pyramid_has_norms_in_laterals_outputs_and_heads():
    net = build("batch", pyramid=True)
    found, variables = jax.eval_shape(lambda: net.init_with_output(KEY, INPUTS, True))
    assert found.masks.shape == (1, 6, 12, 12)
    stats = variables["batch_stats"]
    for number in (1, 2, 3, 4):
        assert {f"lateral{number}_norm", f"output{number}_norm"} <= stats.keys()
        for head in ("box_convolutions", "mask_convolutions"):
            assert f"conv{number}_norm" in stats[head]
    assert variables["params"]["rpn"]["objectness"]["kernel"].shape[-1] == 3
    assert variables["params"]["box_head"]["classes"]["kernel"].shape == (16, 4)


@pytest.mark.slow
def test_with_gain_1_it_is_batch_norm():
    """Losses, what is written, and gradients."""
    kalman = build("kalman", normalizer={"gain": 1.0})
    batch = build("batch")
    variables = filled(batch)
    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(learn, net), has_aux=True))(
            variables["params"], variables["batch_stats"]
        )
        for net in (kalman, batch)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=1e-3, atol=1e-4 * max(1, np.abs(b).max())
        ),
        found,
        expected,
    )
