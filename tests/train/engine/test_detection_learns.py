"""The task of detection with a real network: Mask R-CNN on digit scenes."""

import math

import jax
import pytest

from tests.train.common import tiny_config
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


def test_two_steps_of_mask_rcnn():
    config = scenes_config(
        norm="batch",
        network_options=TINY,
        batch_size=2,
        train_examples=4,
        test_examples=1,
        learning_rate=0.01,
    )
    experiment = build(config)
    state, losses = experiment.state, []
    for step in range(2):
        state, metrics = experiment.train_step(state, experiment.batch(step))
        losses.append(jax.device_get(metrics))
    for found in losses:
        assert found["loss"] == pytest.approx(sum(found[n] for n in LOSSES[:-1]))
        assert all(0 < found[name] < math.inf for name in LOSSES)
    assert losses[0]["mask"] == pytest.approx(math.log(2), abs=0.01)
