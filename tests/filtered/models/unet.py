"""A UNet: transposed convolutions, and skips that are concatenated."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class DoubleConv(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = jax.nn.relu(x)
        return x


class UNet(nn.Module):
    features: tuple[int, ...] = (4, 8)

    @nn.compact
    def __call__(self, x, train):
        skips = []
        for features in self.features:
            x = DoubleConv(features)(x, train)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = DoubleConv(2 * self.features[-1])(x, train)
        for features, skip in zip(reversed(self.features), reversed(skips)):
            x = nn.ConvTranspose(features, (2, 2), strides=(2, 2))(x)
            x = jnp.concatenate([skip, x], axis=-1)
            x = DoubleConv(features)(x, train)
        return nn.Conv(1, (1, 1))(x)
