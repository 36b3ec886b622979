"""The programs that are measured: the trainer's step on random images."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import cifar10_short
from train.data import Split
from train.experiment import check, make_network, make_optimizer
from train.mesh import make_mesh, take
from train.sets import Dataset
from train.step import TrainState, create_state, make_train_step

BASELINE = "flax"
VARIANTS = {
    # `nn.BatchNorm` as Flax has it, and with two centred passes for the variance.
    "flax": {"norm": "batch", "norm_options": '{"use_fast_variance": true}'},
    "batch": {"norm": "batch"},
    "ours": {"norm": "kalman", "norm_options": '{"gain": 1.0}'},
    "group": {"norm": "group"},
    "batch_renorm": {"norm": "batch_renorm"},
    "kalman": {"norm": "kalman"},
    "kalman_wc": {"norm": "kalman_wc"},
    "kalman_mc": {"norm": "kalman_mc"},
}


def configure(variant: str, **keys: Any) -> ConfigDict:
    """Returns the config of one program."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known are {list(VARIANTS)}.")
    config = cifar10_short.get_config()
    config.update(keys)
    config.update(VARIANTS[variant])
    check(config)
    return config


def prepare(config: ConfigDict, size: int) -> tuple[Any, Any, TrainState, Split]:
    """Returns network, train step, state and a batch of random images of that size."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (config.batch_size, size, size, 3), np.uint8)
    split = Split(images, random.integers(0, 10, config.batch_size, np.int32))
    network = make_network(config, Dataset(split, split, 10))
    optimizer = make_optimizer(config, lambda step: config.learning_rate)
    mesh = make_mesh(config.batch_size // config.micro_batch_size)
    state = create_state(network, optimizer, 0, images.shape[1:], mesh)
    step = make_train_step(network, optimizer, lambda x: x / 128.0 - 1.0, config, mesh)
    return network, step, state, take(mesh, split, np.arange(config.batch_size))


def compile_inference(network: Any, state: TrainState, images: jax.Array) -> Any:
    """Compiles inference by moving statistics (option A)."""

    @jax.jit
    def infer(state: TrainState, images: jax.Array) -> jax.Array:
        x = images / 128.0 - 1.0
        return network.apply(state.variables, x, use_running_average=True)

    return infer.lower(state, images).compile()
