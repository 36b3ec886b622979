"""The task of detection with a real network: Mask R-CNN on digit scenes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kalman_flax.models.detection.boxes import make_anchors
from kalman_flax.models.detection.matching import label_anchors
from kalman_flax.models.detection.recipe import Recipe
from tests.train.common import build, tiny_config
from train.data.scene_objects import load_scenes
from train.engine.detection import LOSSES

#: of the recipe and the network, for a program that compiles in seconds
TINY = dict(
    stage_sizes=(1, 1, 1, 1),
    roi_size=4,
    rpn_channels=8,
    mask_channels=8,
    candidates_training=32,
    candidates=32,
    proposals_training=16,
    proposals=16,
    roi_samples=8,
    roi_positives=4,
    detections=4,
)


def scenes_config(**overrides):
    options = dict(
        task="detection",
        dataset="scenes",
        network="mask_rcnn_small",
        image_size=64,
        micro_batch_size=1,
        clip_norm=1.0,
    )
    return tiny_config(**options | overrides)


def test_anchors_of_the_small_recipe_fit_the_digits():
    """Several an object: one an object is too few to learn proposals from."""
    recipe, size = Recipe.small(), jnp.array([64, 64])
    objects = load_scenes((32, 1), 64).train.objects
    anchors = make_anchors((8, 8), 8, recipe.anchor_sizes, recipe.anchor_ratios)

    def label(boxes, valid):
        labels, matched = label_anchors(
            jnp.asarray(anchors.reshape(-1, 4)),
            boxes,
            valid,
            jnp.zeros_like(valid),
            size,
            positive=recipe.rpn_positive,
            negative=recipe.rpn_negative,
            crowd_overlap=recipe.crowd_overlap,
        )
        return labels == 1, matched

    valid = objects.labels > 0
    positive, matched = jax.jit(jax.vmap(label))(objects.boxes, valid)
    assert positive.sum() > 3 * valid.sum()
    found = [
        np.unique(m[p]).size for m, p in zip(*map(np.asarray, (matched, positive)))
    ]
    assert sum(found) > 0.97 * valid.sum()


def two_steps(devices=1, **overrides):
    """Experiment, first and last state, and the losses."""
    options = dict(
        norm="kalman",
        network="shallow",
        plugins=("tests.train.engine.shallow_detector",),
        network_options=dict(recipe_of_a_test()),
        batch_size=4,
        train_examples=4,
        test_examples=1,
        learning_rate=0.01,
    )
    config = scenes_config(**options | overrides)
    experiment = build(config, devices=jax.devices()[:devices])
    first, losses = jax.device_get(experiment.state), []
    state = experiment.state
    for step in range(2):
        state, metrics = experiment.train_step(state, experiment.batch(step))
        losses.append(jax.device_get(metrics))
    return first, jax.device_get(state), losses


def recipe_of_a_test():
    """What `Recipe.small` has otherwise; `TINY` but for the network."""
    return {name: value for name, value in TINY.items() if name != "stage_sizes"}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        pytest.param(
            dict(
                network="mask_rcnn_small",
                network_options=TINY,
                norm="batch",
                batch_size=2,
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_steps_of_mask_rcnn(overrides):
    """Every parameter and running statistic moves."""
    first, last, losses = two_steps(**overrides)
    for found in losses:
        assert found["loss"] == pytest.approx(sum(found[n] for n in LOSSES[:-1]))
        assert all(0 < found[name] < math.inf for name in LOSSES)
    assert losses[0]["mask"] == pytest.approx(math.log(2), abs=0.01)
    before, after = ((state.params, state.batch_stats) for state in (first, last))
    moved = jax.tree.map(lambda x, y: bool(np.any(x != y)), before, after)
    assert jax.tree.all(moved), moved


@pytest.mark.slow
def test_two_devices_and_two_parts_change_nothing():
    """Nor does the draw of anchors and regions depend on them."""
    one, two = (
        two_steps(devices, accumulate=accumulate)[1:]
        for devices, accumulate in ((1, 1), (2, 2))
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), one, two
    )


@pytest.fixture
def optimised():
    """For what runs longer than it compiles, see `tests/conftest.py`."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("network", ["mask_rcnn_small", "mask_rcnn_small_fpn"])
def test_it_finds_the_digits_that_it_was_trained_on(network):
    """By the moving statistics and by those of each image. One block a stage."""
    config = scenes_config(
        network=network,
        network_options=dict(stage_sizes=(1, 1, 1, 1), roi_samples=16),
        width=0,  # the network's own
        batch_size=4,
        train_examples=16,
        test_examples=1,
        eval_batch_size=8,
        optimizer="adamw",
        learning_rate=0.003,
        warmup_epochs=0,
        epochs=100,
    )
    experiment = build(config, devices=jax.devices()[:1])
    state = experiment.state
    for step in range(experiment.total_steps):
        state, _ = experiment.train_step(state, experiment.batch(step))
    task = experiment.task
    found = task.evaluate(state, task.train)
    print({name: round(ap, 3) for name, ap in found.items() if name.endswith("AP50")})
    assert found["moving_box_AP50"] > 0.5
    assert found["batch_box_AP50"] > 0.5
    assert found["moving_mask_AP50"] > 0.3
