"""Pre-activation ResNet for small images, of 6n + 2 layers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn

from kalman_flax.layers.functions import avg_pool, pad_channels, relu
from kalman_flax.layers.linear import RNG
from kalman_flax.layers.signal import Signal
from kalman_flax.models.network import Layers, Network


class Block(nn.Module):
    """norm, activation, conv, twice; plus the filtered stream.

    Attributes:
        features: output channels.
        strides: of the first convolution; the shortcut pools by as much, and grows by
            channels of zeros.
        norm, conv: factories.
        activation: what follows each norm.
        normalized_input: the input is normalised and activated already (first block).
    """

    features: int
    norm: Callable[..., nn.Module]
    conv: Callable[..., nn.Module]
    strides: int = 1
    activation: Callable[[Signal], Signal] = relu
    normalized_input: bool = False

    @nn.compact
    def __call__(self, x: Signal) -> Signal:
        """Maps ``[N, H, W, C]`` to ``[N, H / strides, W / strides, features]``."""
        conv = functools.partial(self.conv, self.features, (3, 3))
        if self.normalized_input:
            y = x
        else:
            norm = self.norm(name="norm1")
            filtered = norm.filter(x)
            x, y = filtered.signal, self.activation(norm.normalize(filtered))
        y = conv(strides=self.strides, name="conv1")(y)
        y = self.activation(self.norm(name="norm2")(y))
        y = conv(name="conv2")(y)
        return y + self._shortcut(x)

    def _shortcut(self, x: Signal) -> Signal:
        if self.strides > 1:
            x = avg_pool(x, (self.strides,) * 2, strides=(self.strides,) * 2)
        extra = self.features - x.value.shape[-1]
        return pad_channels(x, extra // 2, extra - extra // 2) if extra else x


class ResNet(Network):
    """The CIFAR ResNet of He et al. (2016, "Identity mappings"), as the released KN
    experiments build it: 3x3 stem, three stages of `blocks_per_stage` blocks with
    width, 2 width and 4 width channels, pooled and zero-padded shortcuts, final norm,
    activation and global pool.

    Attributes are those of `Network`, and:

    Attributes:
        num_classes: number of logits.
        blocks_per_stage: n; the network has 6n + 2 layers.
        width: channels of the first stage.
        scan: run the blocks of a stage that share a shape as one `nn.scan`: compiles
            faster for deep networks, but its gradient is some 50 times slower on CPU.
            Their variables then have a leading axis, under ``stage1_blocks`` and so on.
    """

    num_classes: int
    blocks_per_stage: int = 3
    width: int = 16
    scan: bool = False

    def _features(self, x: Signal, layers: Layers) -> Signal:
        norm, conv, activation = layers
        block = functools.partial(self._block(Block), **layers._asdict())
        x = conv(self.width, (3, 3), name="stem")(x)
        x = activation(norm(name="stem_norm")(x))
        for stage in range(3):
            features = self.width * 2**stage
            x = block(
                features,
                strides=1 if stage == 0 else 2,
                normalized_input=stage == 0,
                name=f"stage{stage + 1}_block1",
            )(x)
            x = self._rest_of_stage(functools.partial(block, features), stage + 1, x)
        return activation(norm(name="final_norm")(x))

    def _rest_of_stage(
        self, block: Callable[..., nn.Module], stage: int, x: Signal
    ) -> Signal:
        """The second to last block of a stage: all alike, in and out of one shape."""
        if not self.scan:
            for index in range(2, self.blocks_per_stage + 1):
                x = block(name=f"stage{stage}_block{index}")(x)
            return x
        if self.blocks_per_stage == 1:
            return x
        blocks = nn.scan(
            lambda module, carry, _: (module(carry), None),
            variable_axes={"params": 0, "batch_stats": 0, "gradient_stats": 0},
            split_rngs={"params": True, RNG: True},
            length=self.blocks_per_stage - 1,
        )
        return blocks(block(name=f"stage{stage}_blocks"), x, None)[0]
