"""Pre-activation ResNet for small images, of 6n + 2 layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kalman_flax.layers.functions import avg_pool, global_avg_pool, pad_channels, relu
from kalman_flax.layers.kalman_norm import KalmanNorm
from kalman_flax.layers.linear import RNG, Conv, Dense
from kalman_flax.layers.signal import Signal
from kalman_flax.state import KalmanState

_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


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
            x = norm.filter(x)
            y = self.activation(norm.normalize(x))
        y = conv(strides=self.strides, name="conv1")(y)
        y = self.activation(self.norm(name="norm2")(y))
        y = conv(name="conv2")(y)
        return y + self._shortcut(x)

    def _shortcut(self, x: Signal) -> Signal:
        if self.strides > 1:
            x = avg_pool(x, (self.strides,) * 2, strides=(self.strides,) * 2)
        extra = self.features - x.value.shape[-1]
        return pad_channels(x, extra // 2, extra - extra // 2) if extra else x


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016, "Identity mappings"), as the released KN
    experiments build it: 3x3 stem, three stages of `blocks_per_stage` blocks with
    width, 2 width and 4 width channels, pooled and zero-padded shortcuts, final norm,
    activation and global pool.

    Attributes:
        num_classes: number of logits.
        blocks_per_stage: n; the network has 6n + 2 layers.
        width: channels of the first stage.
        norm: factory of the normaliser, e.g. ``functools.partial(KalmanNorm,
            momentum=0.9)``; it gets ``use_running_average`` and ``name``.
        conv: factory of the convolutions, `Conv` with options.
        input_state: what the filter knows of the images where they come as a plain
            array: (0, 1) for standardised ones, None for nothing.
        activation: what follows each norm; the identity for a norm with a nonlinearity
            of its own.
        scan: run the blocks of a stage that share a shape as one `nn.scan`: compiles
            faster for deep networks, but its gradient is some 50 times slower on CPU.
            Their variables then have a leading axis, under ``stage1_blocks`` and so on.
        dtype: of the computation; parameters, statistics and logits stay float32.
    """

    num_classes: int
    blocks_per_stage: int = 3
    width: int = 16
    norm: Callable[..., nn.Module] = KalmanNorm
    conv: Callable[..., nn.Module] = Conv
    input_state: KalmanState | None = KalmanState(0.0, 1.0)
    activation: Callable[[Signal], Signal] = relu
    scan: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Signal | jax.Array, use_running_average: bool
    ) -> jax.Array:
        """Maps ``[N, H, W, channels]`` to logits ``[N, num_classes]``, float32.

        Args:
            images: a plain array, or a Signal that brings its own state.
            use_running_average: True for inference by moving statistics (option A).
        """
        conv = functools.partial(
            self.conv, use_bias=False, dtype=self.dtype, kernel_init=_he_normal
        )
        norm = functools.partial(
            self.norm, use_running_average=use_running_average, dtype=self.dtype
        )
        block = functools.partial(
            Block, norm=norm, conv=conv, activation=self.activation
        )
        if not isinstance(images, Signal):
            images = Signal(images, self.input_state)

        x = conv(self.width, (3, 3), name="stem")(images)
        x = self.activation(norm(name="stem_norm")(x))
        for stage in range(3):
            features = self.width * 2**stage
            x = block(
                features,
                strides=1 if stage == 0 else 2,
                normalized_input=stage == 0,
                name=f"stage{stage + 1}_block1",
            )(x)
            x = self._rest_of_stage(functools.partial(block, features), stage + 1, x)
        x = global_avg_pool(self.activation(norm(name="final_norm")(x)))
        return Dense(self.num_classes, name="head")(x).value.astype(jnp.float32)

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
