"""ResNet-50, -101 and so on: bottleneck blocks, activation after the sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def stem(x: Signal, width: int, layers: Layers, *, pool: bool = True) -> Signal:
    """7x7 convolution of stride 2, norm and activation, and 3x3 max-pooling of stride
    2: ``[N, H, W, C]`` to ``[N, H / 4, W / 4, width]``, or half of H and W without the
    pool."""
    x = layers.conv_norm_activation(x, width, 7, strides=2, name="stem")
    if not pool:
        return x
    return max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def stage(
    number: int,
    count: int,
    width: int,
    layers: Layers,
    *,
    block: Callable[..., nn.Module] = Bottleneck,
    **options: Any,
) -> list[Callable[[Signal], Signal]]:
    """Makes the blocks of a stage, ``stage{number}_block1`` and so on, to be called one
    after the other; within a compact method. A detector calls the last stage on crops.

    Args:
        number: 1 for the first; the others halve the map.
        count: of blocks.
        width: inner channels of the first stage's blocks, doubled stage by stage.
        layers: norm, convolution and activation.
        block, **options: class of the blocks, and attributes of them.
    """
    return [
        block(
            width * 2 ** (number - 1),
            layers,
            strides=2 if number > 1 and index == 1 else 1,
            name=f"stage{number}_block{index}",
            **options,
        )
        for index in range(1, count + 1)
    ]


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
        stem_pool: False leaves the max-pooling out, for small images.
    """

    num_classes: int
    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    stride_in_1x1: bool = False
    zero_init_last_scale: bool = False
    stem_pool: bool = True

    def _features(self, x: Signal, layers: Layers) -> Signal:
        x = stem(x, self.width, layers, pool=self.stem_pool)
        for number, count in enumerate(self.stage_sizes, start=1):
            for block in stage(
                number,
                count,
                self.width,
                layers,
                block=self._block(Bottleneck),
                stride_in_1x1=self.stride_in_1x1,
                zero_init_last_scale=self.zero_init_last_scale,
            ):
                x = block(x)
        return x
