"""The CIFAR ResNet in plain Flax: what serves an exported network.

It knows nothing of `kalman_flax` but the names of the layers.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def _batch_norm(name: str, use_running_average: bool) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average, use_fast_variance=False, name=name)


def _conv(features: int, strides: int, name: str) -> nn.Conv:
    return nn.Conv(features, (3, 3), strides=strides, use_bias=False, name=name)


class PlainBlock(nn.Module):
    features: int
    strides: int
    normalized_input: bool

    @nn.compact
    def __call__(self, x: jax.Array, use_running_average: bool) -> jax.Array:
        y = x
        if not self.normalized_input:
            y = nn.relu(_batch_norm("norm1", use_running_average)(x))
        y = _conv(self.features, self.strides, "conv1")(y)
        y = nn.relu(_batch_norm("norm2", use_running_average)(y))
        y = _conv(self.features, 1, "conv2")(y)
        if self.strides > 1:
            window = (self.strides, self.strides)
            x = nn.avg_pool(x, window, strides=window)
        extra = self.features - x.shape[-1]
        pad = (extra // 2, extra - extra // 2)
        return y + jnp.pad(x, [(0, 0), (0, 0), (0, 0), pad])


class PlainResNet(nn.Module):
    num_classes: int
    blocks_per_stage: int
    width: int

    @nn.compact
    def __call__(self, images: jax.Array, use_running_average: bool) -> jax.Array:
        x = _conv(self.width, 1, "stem")(images)
        x = nn.relu(_batch_norm("stem_norm", use_running_average)(x))
        for stage in (1, 2, 3):
            for index in range(1, self.blocks_per_stage + 1):
                x = PlainBlock(
                    features=self.width * 2 ** (stage - 1),
                    strides=2 if stage > 1 and index == 1 else 1,
                    normalized_input=stage == index == 1,
                    name=f"stage{stage}_block{index}",
                )(x, use_running_average)
        x = nn.relu(_batch_norm("final_norm", use_running_average)(x))
        return nn.Dense(self.num_classes, name="head")(jnp.mean(x, axis=(1, 2)))


def unstack_blocks(collection: dict[str, Any]) -> dict[str, Any]:
    """Gives ``stage1_blocks``, stacked by a scan, the names that a loop gives them."""
    result = {}
    for name, subtree in collection.items():
        if not name.endswith("_blocks"):
            result[name] = subtree
            continue
        for index in range(len(jax.tree.leaves(subtree)[0])):
            block = jax.tree.map(lambda leaf, i=index: leaf[i], subtree)
            result[f"{name.removesuffix('s')}{index + 2}"] = block
    return result
