"""The first layer that gives a bad number."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kalman_flax import relu
from tests.train.common import batch, build, tiny_config
from train.engine import loop
from train.engine.diagnose import find_bad_number

CONFIG = tiny_config(norm="kalman", debug_nans=True, remat=True)


def flat(x):
    """Finite, with a gradient that is not."""
    return jax.tree.map(lambda x: x + jnp.sqrt(0.0 * x), relu(x))


@pytest.fixture(scope="module")
def experiment():
    return build(CONFIG)


def find(experiment, state):
    return find_bad_number(experiment, CONFIG, state, batch(experiment))


def test_forward(experiment):
    """Of all that a NaN spreads to; methods other than calls are named."""
    params = jax.tree.map(lambda x: x, experiment.state.params)
    params["stage1_block1"]["norm2"]["scale"] *= jnp.nan
    found = find(experiment, experiment.state.replace(params=params))
    layer = "stage1_block1/norm2.normalize"
    assert found == f"{layer} is the first layer whose output is not finite"


def test_backward(experiment):
    network = experiment.task.network.clone(activation=flat)
    task = dataclasses.replace(experiment.task, network=network)
    found = find(dataclasses.replace(experiment, task=task), experiment.state)
    assert found.startswith("all outputs are finite; final_norm is the first layer")


def test_update(tmp_path):
    config = tiny_config(debug_nans=True, learning_rate=1e38)
    with pytest.raises(
        loop.NonFiniteError, match=r"at step 1: .*\nWhere it began: all"
    ):
        loop.train(config, tmp_path)
