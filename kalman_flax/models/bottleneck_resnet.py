"""ResNet-50, -101 and so on: bottleneck blocks, activation after the sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from kalman_flax.layers.functions import max_pool
from kalman_flax.layers.signal import Signal
from kalman_flax.models.network import Layers, Network

_EXPANSION = 4  # output channels of a block, in units of its inner ones


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, each with norm; plus the shortcut, then activation.

    Attributes:
        features: inner channels; four times as many come out.
        layers: norm, convolution and activation.
        strides, stride_in_1x1, zero_init_last_scale: as in `BottleneckResNet`, the
            strides those of this block.
    """

    features: int
    layers: Layers
    strides: int = 1
    stride_in_1x1: bool = False
    zero_init_last_scale: bool = False

    @nn.compact
    def __call__(self, x: Signal) -> Signal:
        """Maps ``[N, H, W, C]`` to ``[N, H / strides, W / strides, 4 features]``."""
        layers, features = self.layers, self.features
        first, second = (self.strides, 1) if self.stride_in_1x1 else (1, self.strides)
        options: dict[str, Any] = (
            {"scale_init": nn.initializers.zeros} if self.zero_init_last_scale else {}
        )
        y = layers.conv_norm_activation(x, features, 1, strides=first, name="conv1")
        y = layers.conv_norm_activation(y, features, 3, strides=second, name="conv2")
        y = layers.conv_norm(y, _EXPANSION * features, 1, name="conv3", **options)
        return layers.activation(y + self._shortcut(x))

    def _shortcut(self, x: Signal) -> Signal:
        features = _EXPANSION * self.features
        if self.strides == 1 and x.value.shape[-1] == features:
            return x
        return self.layers.conv_norm(
            x, features, 1, strides=self.strides, name="shortcut"
        )


class BottleneckResNet(Network):
    """The ResNet of He et al. (2016, "Deep Residual Learning for Image Recognition",
    table 1) for 224x224 images: 7x7 stem and max-pooling, both of stride 2, stages of
    bottleneck blocks of which all but the first halve the map, projection shortcuts
    (option B) where the shape changes, global pool.

    By default what is called v1.5 (torchvision, and Goyal et al., 2017): the 3x3
    convolution strides. The sum in a block carries the states of both branches; max-
    pooling observes afresh. For a norm with a nonlinearity of its own the sum has none.

    Attributes are those of `Network`, and:

    Attributes:
        num_classes: number of logits.
        stage_sizes: blocks of each stage; (3, 4, 6, 3) is ResNet-50, (3, 4, 23, 3)
            ResNet-101.
        width: inner channels of the first stage's blocks, doubled stage by stage.
        stride_in_1x1: the first 1x1 convolution of a block strides, and not the 3x3:
            the original, whose published weights detectors start from.
        zero_init_last_scale: each block's last scale starts at 0 (Goyal et al., 2017,
            section 5.1), so that the block starts as its shortcut. The normaliser has
            to have a scale.
    """

    num_classes: int
    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    stride_in_1x1: bool = False
    zero_init_last_scale: bool = False

    def _features(self, x: Signal, layers: Layers) -> Signal:
        x = layers.conv_norm_activation(x, self.width, 7, strides=2, name="stem")
        x = max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        bottleneck = self._block(Bottleneck)
        for stage, blocks in enumerate(self.stage_sizes, start=1):
            for block in range(1, blocks + 1):
                x = bottleneck(
                    self.width * 2 ** (stage - 1),
                    layers,
                    strides=2 if stage > 1 and block == 1 else 1,
                    stride_in_1x1=self.stride_in_1x1,
                    zero_init_last_scale=self.zero_init_last_scale,
                    name=f"stage{stage}_block{block}",
                )(x)
        return x
