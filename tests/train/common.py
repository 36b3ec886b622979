"""A run small enough for a test: ResNet-8 of width 4, a few updates of 8 digits."""

import numpy as np

from configs import base
from train.engine.mesh import take

INDEX = np.arange(8)


def batch(experiment, index=INDEX):
    """The training examples `index`, as the train step takes them."""
    return take(experiment.mesh, experiment.task.train, index)


def tiny_config(**overrides):
    config = base.get_config()
    config.update(
        train_examples=64,
        width=4,
        batch_size=8,
        epochs=2,
        log_steps=3,
        eval_batch_size=128,
    )
    config.update(overrides)
    return config
