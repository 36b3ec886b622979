"""Normaliser-free ResNet for small images: scaled branches, standardised kernels."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from kalman_flax.baselines.scaled_weight_norm import (
    scaled,
    scaled_relu,
    scaled_weight_conv,
)
from kalman_flax.baselines.weight_norm import Bias
from kalman_flax.layers.signal import Signal
from kalman_flax.models.network import Layers, Network


class NFBlock(nn.Module):
    """x -> shortcut + alpha skip_gain f(o) with o = activation(x) / std, where f is two
    3x3 convolutions with an activation between; the shortcut is x, or a 1x1 convolution
    of o where the shape changes. The scalar ``skip_gain`` starts at 0, as in SkipInit
    (De and Smith, 2020), so that a block starts as its shortcut.

    Attributes:
        features: output channels.
        layers: norm, convolution and activation.
        std: the standard deviation that x is expected to have.
        alpha: share of f, whose variance is 1, in the sum.
        strides: of the first convolution and of the shortcut.
    """

    features: int
    layers: Layers
    std: float
    alpha: float
    strides: int = 1

    @nn.compact
    def __call__(self, x: Signal) -> Signal:
        """Maps ``[N, H, W, C]`` to ``[N, H / strides, W / strides, features]``."""
        layers, features, strides = self.layers, self.features, self.strides
        y = scaled(layers.activation(x), 1.0 / self.std)
        if strides > 1 or x.value.shape[-1] != features:
            x = layers.conv_norm(y, features, 1, strides=strides, name="shortcut")
        y = layers.conv_norm_activation(y, features, 3, strides=strides, name="conv1")
        y = layers.conv_norm(y, features, 3, name="conv2")
        gain = self.param("skip_gain", nn.initializers.zeros, (), jnp.float32)
        return x + scaled(y, self.alpha * gain)


class NFResNet(Network):
    """The normaliser-free ResNet of Brock, De and Smith (ICLR 2021, "Characterizing
    signal propagation to close the performance gap in unnormalized ResNets") at the
    sizes of `ResNet`: 3x3 stem, three stages of `blocks_per_stage` blocks with width, 2
    width and 4 width channels, activation, global pool. Kernels are standardised, and
    scaled such that they keep the variance of what enters. Each block divides by the
    standard deviation that the blocks before it lead to expect: its square is 1 at
    first, 1 + alpha^2 after the first block of a stage, and alpha^2 more after another.
    No moments of an activation are ever taken: examples do not depend on one another,
    training and inference are the same. Use it at any micro-batch size, where large
    batches or rates need it with `optax.adaptive_grad_clip` (in the trainer the config
    key `clip_adaptive`; Brock et al., 2021, "High-
    performance large-scale image recognition without normalization"). It follows
    deepmind-research/nfnets but for stochastic depth, which is left out, the bottleneck
    in its blocks, and the initial values of the head.

    Attributes are those of `Network`, of which norm, conv and activation default to
    what makes it normaliser-free, a bias for each convolution, `scaled_weight_conv`
    and `scaled_relu`: ``normalization("normalizer_free")``. Another norm would stand
    after each convolution, in the place of the bias. And:

    Attributes:
        num_classes: number of logits.
        blocks_per_stage: n; the network has 6n + 2 layers.
        width: channels of the first stage.
        alpha: how much variance a block may add.
    """

    num_classes: int
    blocks_per_stage: int = 3
    width: int = 16
    alpha: float = 0.2
    norm: Callable[..., nn.Module] = dataclasses.field(default=Bias, kw_only=True)
    conv: Callable[..., nn.Module] = dataclasses.field(
        default=scaled_weight_conv, kw_only=True
    )
    activation: Callable[[Signal], Signal] = dataclasses.field(
        default=scaled_relu, kw_only=True
    )

    def _features(self, x: Signal, layers: Layers) -> Signal:
        block = functools.partial(self._block(NFBlock), alpha=self.alpha, layers=layers)
        x = layers.conv_norm(x, self.width, 3, name="stem")
        var = 1.0
        for stage in range(3):
            for index in range(self.blocks_per_stage):
                x = block(
                    self.width * 2**stage,
                    std=math.sqrt(var),
                    strides=2 if stage and not index else 1,
                    name=f"stage{stage + 1}_block{index + 1}",
                )(x)
                var = (var if index else 1.0) + self.alpha**2
        return layers.activation(x)
