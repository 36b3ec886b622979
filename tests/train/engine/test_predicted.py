"""A run says how many of its Kalman normalisers got a prediction."""

import pytest

from tests.train.common import build, tiny_config
from train.engine.normalizer import count_predicted


def count(state_of_images=True, **options):
    experiment = build(tiny_config(**options))
    task = experiment.task
    network = task.network
    if not state_of_images:
        network = network.clone(input_state=None)
    return count_predicted(network, experiment.state.variables, task.inputs())


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {"predicted": [3, 3]}),
        ({"state_of_images": False}, {"predicted": [2, 3]}),
        ({"sync_statistics": True}, {"predicted": [3, 3]}),
        ({"norm": "batch"}, {}),
    ],
)
def test_count(options, expected):
    assert count(**options) == expected
