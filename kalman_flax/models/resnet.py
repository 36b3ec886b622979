"""ResNet for small images, of 6n + 2 layers, pre-activation or the original."""

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
        return y + _shortcut(x, self.features, self.strides, window=self.strides)


class OriginalBlock(nn.Module):
    """conv and norm, twice, with an activation between; plus the input, and activated.

    Attributes are those of `Block`.
    """

    features: int
    norm: Callable[..., nn.Module]
    conv: Callable[..., nn.Module]
    strides: int = 1
    activation: Callable[[Signal], Signal] = relu

    @nn.compact
    def __call__(self, x: Signal) -> Signal:
        """Maps ``[N, H, W, C]`` to ``[N, H / strides, W / strides, features]``."""
        conv = functools.partial(self.conv, self.features, (3, 3))
        y = conv(strides=self.strides, name="conv1")(x)
        y = self.activation(self.norm(name="norm1")(y))
        y = self.norm(name="norm2")(conv(name="conv2")(y))
        return self.activation(y + _shortcut(x, self.features, self.strides, window=1))


def _shortcut(x: Signal, features: int, strides: int, window: int) -> Signal:
    """The means of `window` x `window` positions, and channels of zeros."""
    if strides > 1:
        x = avg_pool(x, (window,) * 2, strides=(strides,) * 2)
    extra = features - x.value.shape[-1]
    return pad_channels(x, extra // 2, extra - extra // 2) if extra else x


class ResNet(Network):
    """The CIFAR ResNet: 3x3 stem, three stages of `blocks_per_stage` blocks with width,
    2 width and 4 width channels, shortcuts padded with channels of zeros, global pool.

    Pre-activation, it is that of He et al. (2016, "Identity mappings"), as the released
    KN experiments build it: shortcuts are pooled, and a norm and an activation end it.
    Otherwise it is the original, He et al. (2015, "Deep residual learning", section
    4.2), which the text of the KN paper cites: blocks of `OriginalBlock`, shortcuts
    that keep every second position (option A), and as many parameters.

    Attributes are those of `Network`, and:

    Attributes:
        num_classes: number of logits.
        blocks_per_stage: n; the network has 6n + 2 layers.
        width: channels of the first stage.
        pre_activation: norm and activation precede each convolution of a block.
        scan: run the blocks of a stage that share a shape as one `nn.scan`: compiles
            faster for deep networks, but its gradient is some 50 times slower on CPU.
            Their variables then have a leading axis, under ``stage1_blocks`` and so on.
    """

    num_classes: int
    blocks_per_stage: int = 3
    width: int = 16
    pre_activation: bool = True
    scan: bool = False

    def _features(self, x: Signal, layers: Layers) -> Signal:
        norm, conv, activation = layers
        kind = Block if self.pre_activation else OriginalBlock
        block = functools.partial(self._block(kind), **layers._asdict())
        x = conv(self.width, (3, 3), name="stem")(x)
        x = activation(norm(name="stem_norm")(x))
        for stage in range(3):
            features = self.width * 2**stage
            options = {"strides": 1 if stage == 0 else 2}
            if self.pre_activation:
                options["normalized_input"] = stage == 0
            x = block(features, **options, name=f"stage{stage + 1}_block1")(x)
            x = self._rest_of_stage(functools.partial(block, features), stage + 1, x)
        return activation(norm(name="final_norm")(x)) if self.pre_activation else x

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
