"""A ResNet as Flax's ImageNet example is written: the norm is an argument, the shortcut
is projected where its shape differs. It knows nothing of `kalman_flax`."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp


class ResNetBlock(nn.Module):
    filters: int
    conv: Callable[..., Any]
    norm: Callable[..., Any]
    act: Callable[..., Any]
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        residual = x
        y = self.conv(self.filters, (3, 3), self.strides)(x)
        y = self.act(self.norm()(y))
        y = self.conv(self.filters, (3, 3))(y)
        y = self.norm(scale_init=nn.initializers.constant(0.5))(y)
        if residual.shape != y.shape:
            residual = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(
                residual
            )
            residual = self.norm(name="norm_proj")(residual)
        return self.act(residual + y)


class ResNet(nn.Module):
    stage_sizes: tuple[int, ...] = (1, 1)
    filters: int = 4
    num_classes: int = 3
    norm: Callable[..., Any] = nn.BatchNorm
    block: Callable[..., Any] = ResNetBlock
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            self.norm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        x = conv(self.filters, (3, 3), name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        for i, size in enumerate(self.stage_sizes):
            for j in range(size):
                x = self.block(
                    self.filters * 2**i,
                    strides=(2, 2) if i > 0 and j == 0 else (1, 1),
                    conv=conv,
                    norm=norm,
                    act=nn.relu,
                )(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x)
