"""The task of detection with a real network: Mask R-CNN on digit scenes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kalman_flax.models.detection.boxes import make_anchors
from kalman_flax.models.detection.matching import label_anchors
from kalman_flax.models.detection.recipe import Recipe
from tests.train.common import tiny_config
from train.data.scene_objects import load_scenes
from train.engine.detection import LOSSES
from train.engine.experiment import build

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


@pytest.mark.slow
def test_two_steps_of_mask_rcnn():
    config = scenes_config(
        norm="batch",
        network_options=TINY,
        batch_size=2,
        train_examples=4,
        test_examples=1,
        learning_rate=0.01,
    )
    experiment = build(config, devices=jax.devices()[:1])
    state, losses = experiment.state, []
    for step in range(2):
        state, metrics = experiment.train_step(state, experiment.batch(step))
        losses.append(jax.device_get(metrics))
    for found in losses:
        assert found["loss"] == pytest.approx(sum(found[n] for n in LOSSES[:-1]))
        assert all(0 < found[name] < math.inf for name in LOSSES)
    assert losses[0]["mask"] == pytest.approx(math.log(2), abs=0.01)


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
def test_it_finds_the_digits_that_it_was_trained_on():
    """By the moving statistics and by those of each image. One block a stage."""
    config = scenes_config(
        network_options=dict(stage_sizes=(1, 1, 1, 1), roi_samples=16),
        width=0,  # the network's own
        batch_size=4,
        train_examples=8,
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
