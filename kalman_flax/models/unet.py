"""U-Net: the class of every pixel, from maps of all scales."""

from __future__ import annotations

import flax.linen as nn

from kalman_flax.layers.functions import concatenate, max_pool, resize
from kalman_flax.layers.signal import Signal
from kalman_flax.models.network import Layers, Network


class DoubleConv(nn.Module):
    """Twice a 3x3 convolution, a norm and an activation.

    Attributes:
        features: output channels.
        layers: what it is built of.
    """

    features: int
    layers: Layers

    @nn.compact
    def __call__(self, x: Signal) -> Signal:
        """Maps ``[N, H, W, C]`` to ``[N, H, W, features]``."""
        for name in ("conv1", "conv2"):
            x = self.layers.conv_norm_activation(x, self.features, 3, name=name)
        return x


class UNet(Network):
    """The U-Net of Ronneberger, Fischer and Brox (MICCAI 2015): maps are halved by max-
    pooling, and grow again, where those of the way down are concatenated to them.

    Unlike theirs, convolutions are padded and have norms, so that logits are those of
    every pixel, and maps grow by repeating each value, which leaves moments as they
    are: so any factory of convolutions will do. Max-pooling observes afresh. Heights
    and widths are best multiples of ``2 ** depth``.

    Maps images ``[N, H, W, channels]`` to logits ``[N, H, W, num_classes]``, float32.
    Attributes are those of `Network`, and:

    Attributes:
        num_classes: number of logits of each pixel.
        width: channels at full size, doubled by each pooling; 64 in the original.
        depth: poolings; 4 in the original.
    """

    num_classes: int
    width: int = 64
    depth: int = 3

    def _features(self, x: Signal, layers: Layers) -> Signal:
        block, skips = self._block(DoubleConv), []
        for level in range(self.depth):
            x = block(self.width * 2**level, layers, name=f"down{level + 1}")(x)
            skips.append(x)
            x = max_pool(x, (2, 2), strides=(2, 2))
        x = block(self.width * 2**self.depth, layers, name="bottom")(x)
        for level, skip in reversed(list(enumerate(skips))):
            x = resize(x, (*skip.shape[:-1], x.shape[-1]), "nearest")
            x = concatenate([skip, x])
            x = block(self.width * 2**level, layers, name=f"up{level + 1}")(x)
        return x

    def _pooled(self, x: Signal) -> Signal:
        return x  # each pixel by itself
