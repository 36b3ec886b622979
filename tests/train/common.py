"""A run small enough for a test: three convolutions, a few updates of 8 digits."""

import copy
import dataclasses

import jax
import numpy as np

from configs import base
from train.engine import experiment
from train.engine.mesh import same, take

INDEX = np.arange(8)
#: what makes it one of three convolutions, see `tests/train/tiny.py`
TINY = {"plugins": ("tests.train.tiny",), "task": "tiny"}
#: the same with the networks that users have, of which `cifar_resnet` is ResNet-8
REAL = {"plugins": (), "task": "classification"}


def batch(experiment, index=INDEX):
    """The training examples `index`, as the train step takes them."""
    return take(experiment.mesh, experiment.task.train, index)


def tiny_config(**overrides):
    config = base.get_config()
    config.update(
        **TINY,
        train_examples=64,
        width=4,
        batch_size=8,
        epochs=2,
        log_steps=3,
        eval_batch_size=128,
    )
    config.update(overrides)
    return config


def build(config, data_dir=None, devices=None):
    """`train.engine.experiment.build`, but each config is built once, and so traced and
    compiled once, except where data in a directory may change. The state is new."""
    if data_dir is not None:
        return experiment.build(config, data_dir, devices)
    key = config.to_json(), devices and tuple(devices)
    if key not in _built:
        built = experiment.build(copy.deepcopy(config), devices=devices)
        state = jax.device_get(built.state)  # as updates take over that on devices
        _built[key] = dataclasses.replace(built, state=state)
    built = _built[key]
    state = jax.device_put(built.state, same(built.mesh))
    return dataclasses.replace(built, state=state)


_built = {}
