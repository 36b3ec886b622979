"""An NNX ResNet, which knows nothing of `kalman_flax`."""

import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    def __init__(self, features, norm, rngs):
        self.conv1 = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = norm(features, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = norm(features, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(x + self.norm2(self.conv2(y)))


class ResNet(nnx.Module):
    def __init__(self, rngs, features=4, norm=nnx.BatchNorm):
        self.stem = nnx.Conv(3, features, (3, 3), rngs=rngs)
        self.norm = norm(features, rngs=rngs)
        self.block = Block(features, norm, rngs)
        self.head = nnx.Linear(features, 3, rngs=rngs)

    def __call__(self, x):
        x = self.block(nnx.relu(self.norm(self.stem(x))))
        return self.head(jnp.mean(x, axis=(1, 2)))
