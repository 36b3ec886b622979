"""A second task, as a plugin: the mean pixel of an image that is not there whole.

Examples are dicts, the network is no classifier, and nothing of it is in the engine.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from train.engine.step import apply_replicas

PIXELS = 6


class Pixels:
    """Random examples, drawn when they are read."""

    def __init__(self, seed, examples):
        self.seed, self.examples = seed, examples

    def read(self, index, key=None):
        rows = [
            np.random.default_rng((self.seed, i)).normal(size=PIXELS) for i in index
        ]
        pixels = np.float32(rows)
        return {"pixels": pixels, "mean": pixels.mean(1)}


class Net(nn.Module):
    """Linear, behind batch norm."""

    @nn.compact
    def __call__(self, x, use_running_average):
        x = nn.BatchNorm(use_running_average, momentum=0.9)(x["pixels"])
        return {"mean": nn.Dense(1)(x)[:, 0]}


@dataclasses.dataclass
class MeanPixel:
    """Half of the squared error; noise on the pixels in training."""

    config: Any
    network = Net()
    train, test = Pixels(0, 64), Pixels(1, 5)
    validation = None
    test_name = "held_out"
    shown: ClassVar = {"loss": ".2g", "error": ".2g"}
    headline = "error"

    @classmethod
    def check(cls, config):
        if config.width != 4:
            raise ValueError("width is for images")

    @classmethod
    def build(cls, config, mesh, data_dir):
        return cls(config)

    def check_data(self, kept, files=False):
        return {}

    def inputs(self):
        return {"pixels": jnp.zeros((1, PIXELS))}

    def order(self):
        size = self.config.batch_size
        return lambda step: (step * size + np.arange(size)) % self.train.examples

    def draw(self, key):
        return {"noise": jax.random.normal(key, (self.config.batch_size, PIXELS))}

    def loss(self, network, variables, batch, draws, keys, mutable=("batch_stats",)):
        inputs = {"pixels": batch["pixels"] + 0.01 * draws["noise"]}
        out, written = apply_replicas(network, variables, inputs, keys, mutable)
        error = out["mean"] - batch["mean"]
        sums = {"loss": 0.5 * jnp.sum(error**2), "error": jnp.sum(jnp.abs(error))}
        return sums, written

    def evaluate(self, state, source):
        batch = source.read(np.arange(source.examples))
        out = self.network.apply(jax.device_get(state.variables), batch, True)
        return {"error": float(np.abs(out["mean"] - batch["mean"]).mean())}


TASKS = {"mean_pixel": MeanPixel}
