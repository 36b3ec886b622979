"""Inception: networks of modules whose branches run side by side and are joined."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from kalman_flax.layers.functions import avg_pool as padded_avg_pool
from kalman_flax.layers.functions import concatenate, max_pool
from kalman_flax.layers.signal import Signal
from kalman_flax.models.network import Layers, Network

#: An average of the values inside the map alone.
avg_pool = functools.partial(padded_avg_pool, count_include_pad=False)

#: A branch: (kernel size, features) of its convolutions.
Branch = Sequence[tuple[int, int]]


class Inception(nn.Module):
    """Branches of convolutions and one of 3x3 pooling, their channels joined.

    Every convolution has its norm and activation, and every branch its own prediction.

    Attributes:
        branches: see `Branch`.
        pool: `avg_pool` or `max_pool`.
        projection: channels of the 1x1 convolution behind the pooling; 0 for none.
        layers: norm, convolution and activation.
        strides: of the pooling and of the last convolution of each branch.
    """

    branches: Sequence[Branch]
    pool: Callable[..., Signal]
    projection: int
    layers: Layers
    strides: int = 1

    @nn.compact
    def __call__(self, x: Signal) -> Signal:
        """Maps ``[N, H, W, C]`` to ``[N, H / strides, W / strides, features]``."""
        joined = [
            self._branch(x, branch, f"branch{index}_conv")
            for index, branch in enumerate(self.branches, start=1)
        ]
        y = self.pool(x, (3, 3), strides=(self.strides,) * 2, padding="SAME")
        if self.projection:
            y = self.layers.conv_norm_activation(
                y, self.projection, 1, name="pool_conv"
            )
        return concatenate([*joined, y])

    def _branch(self, x: Signal, branch: Branch, name: str) -> Signal:
        for index, (kernel_size, features) in enumerate(branch, start=1):
            x = self.layers.conv_norm_activation(
                x,
                features,
                kernel_size,
                strides=self.strides if index == len(branch) else 1,
                name=f"{name}{index}",
            )
        return x


def _v2(
    one: int,
    three: tuple[int, int],
    double: tuple[int, int],
    pool: Callable[..., Signal],
    projection: int,
) -> dict[str, Any]:
    """The module of a row of Figure 5: #1x1, (#3x3 reduce, #3x3), (double #3x3 reduce,
    double #3x3), and the pooling with its projection; without one it has stride 2."""
    branches = (
        ((1, one),),
        ((1, three[0]), (3, three[1])),
        ((1, double[0]), (3, double[1]), (3, double[1])),
    )
    return {
        "branches": branches if one else branches[1:],
        "pool": pool,
        "projection": projection,
        "strides": 1 if projection else 2,
    }


_V2 = {
    "3a": _v2(64, (64, 64), (64, 96), avg_pool, 32),
    "3b": _v2(64, (64, 96), (64, 96), avg_pool, 64),
    "3c": _v2(0, (128, 160), (64, 96), max_pool, 0),
    "4a": _v2(224, (64, 96), (96, 128), avg_pool, 128),
    "4b": _v2(192, (96, 128), (96, 128), avg_pool, 128),
    "4c": _v2(160, (128, 160), (128, 160), avg_pool, 128),
    "4d": _v2(96, (128, 192), (160, 192), avg_pool, 128),
    "4e": _v2(0, (128, 192), (192, 256), max_pool, 0),
    "5a": _v2(352, (192, 320), (160, 224), avg_pool, 128),
    "5b": _v2(352, (192, 320), (192, 224), max_pool, 128),
}


def _in_proportion(features: int, width: int) -> int:
    """`features` of a network of width 64, in one of `width`."""
    return -(-features * width // 64)  # rounded up


class InceptionV2(Network):
    """The BN-Inception of Ioffe and Szegedy, "Batch Normalization" (ICML 2015, figure
    5), for 224x224 images: GoogLeNet with the 5x5 convolutions made two 3x3 ones.

    Widths are those of the figure's columns, with which 4c, 4d and 4e come to 608, 608
    and 1056 channels and the network to the 11.29M parameters of the KN paper's table
    2. TF-slim narrows the projections of 4c and 4d to 96, for 576, 576 and 1024
    channels: 11.19M. The first convolution is an ordinary one; there are no auxiliary
    classifiers. Average pooling does not count the padding (as in TF-slim; in Caffe it
    does), so that the moments at the border are those inside.

    Attributes are those of `Network`, and:

    Attributes:
        num_classes: number of logits.
        width: channels of the first convolution; those of the others are in
            proportion. 64 is the figure's.
    """

    num_classes: int
    width: int = 64

    def _features(self, x: Signal, layers: Layers) -> Signal:
        wide = functools.partial(_in_proportion, width=self.width)
        x = layers.conv_norm_activation(x, wide(64), 7, strides=2, name="conv1")
        x = max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        x = layers.conv_norm_activation(x, wide(64), 1, name="conv2_reduce")
        x = layers.conv_norm_activation(x, wide(192), 3, name="conv2")
        x = max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        inception = self._block(Inception)
        for name, row in _V2.items():
            row = row | {
                "branches": [
                    [(size, wide(features)) for size, features in branch]
                    for branch in row["branches"]
                ],
                "projection": wide(row["projection"]),
            }
            x = inception(**row, layers=layers, name=f"inception_{name}")(x)
        return x


#: Branches and projection of the KN paper's section 4.3.2; GoogLeNet's 3a, 3b and 4a.
_SMALL = (
    ((((1, 64),), ((1, 96), (3, 128)), ((1, 16), (5, 32))), 32),
    ((((1, 128),), ((1, 128), (3, 192)), ((1, 32), (5, 96))), 64),
    ((((1, 192),), ((1, 96), (3, 208)), ((1, 16), (5, 48))), 64),
)


class SmallInception(Network):
    """The Inception of the KN paper's section 4.3.2 (Wang et al., NeurIPS 2018) for
    32x32 images: a convolution of 32 filters to 16x16, and three modules of 256, 480
    and 512 channels at that size, pooled.

    What its table leaves open is our reading: the first convolution is 3x3 of stride 2;
    pooling in a module is the maximum, as in GoogLeNet (Szegedy et al., 2015), whose
    3a, 3b and 4a the modules are; and the omitted dense layer, there of 1,000 outputs,
    has one for each class.

    Attributes are those of `Network`, and:

    Attributes:
        num_classes: number of logits.
    """

    num_classes: int

    def _features(self, x: Signal, layers: Layers) -> Signal:
        x = layers.conv_norm_activation(x, 32, 3, strides=2, name="stem")
        inception = self._block(Inception)
        for index, (branches, projection) in enumerate(_SMALL, start=1):
            name = f"inception{index}"
            x = inception(branches, max_pool, projection, layers, name=name)(x)
        return x
