"""Small members of other families, in the style their owners use."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


class DenseNet(nn.Module):
    """Pre-activation layers whose outputs are concatenated, and a transition."""

    growth: int = 4

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        for block in range(2):
            for _ in range(2):
                y = nn.Conv(4 * self.growth, (1, 1), use_bias=False)(nn.relu(norm()(x)))
                y = nn.Conv(self.growth, (3, 3), use_bias=False)(nn.relu(norm()(y)))
                x = jnp.concatenate([x, y], axis=-1)
            if block == 0:
                x = nn.Conv(x.shape[-1] // 2, (1, 1), use_bias=False)(
                    nn.relu(norm()(x))
                )
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(norm()(x))
        return nn.Dense(3)(jnp.mean(x, axis=(1, 2)))


class ConvMixer(nn.Module):
    """Patches, then depthwise convolutions around a sum, with gelu before the norm."""

    dim: int = 4
    depth: int = 2

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = norm()(nn.gelu(nn.Conv(self.dim, (2, 2), strides=(2, 2))(x)))
        for _ in range(self.depth):
            y = nn.Conv(self.dim, (3, 3), feature_group_count=self.dim)(x)
            x = x + norm()(nn.gelu(y, approximate=False))
            x = norm()(nn.gelu(nn.Conv(self.dim, (1, 1))(x)))
        return nn.Dense(3)(x.mean((1, 2)))


class AudioNet(nn.Module):
    """1-D convolutions over a waveform, dilated and causal."""

    @nn.compact
    def __call__(self, x, train):
        for dilation in (1, 2):
            x = nn.Conv(4, 3, kernel_dilation=dilation, padding="CAUSAL")(x)
            x = nn.leaky_relu(nn.BatchNorm(not train)(x))
            x = nn.Dropout(0.1, deterministic=not train)(x)
        x = nn.avg_pool(x, (2,), strides=(2,))
        x = nn.BatchNorm(not train)(nn.Conv(4, 3, padding="CIRCULAR")(x))
        return nn.Dense(3)(jnp.tanh(x).mean(1))


class VideoNet(nn.Module):
    """3-D convolutions, with a residual sum."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(not train)(nn.Conv(4, (3, 3, 3))(x)))
        y = nn.Conv(4, (3, 1, 1), use_bias=False)(x)
        y = nn.Conv(4, (1, 3, 3), strides=(1, 2, 2), use_bias=False)(y)
        y = nn.BatchNorm(not train)(y)
        x = nn.relu(y + nn.avg_pool(x, (1, 2, 2), strides=(1, 2, 2)))
        x = nn.BatchNorm(not train)(nn.Conv(4, (3, 3, 3))(x))
        return nn.Dense(3)(x.mean((1, 2, 3)))


class HybridViT(nn.Module):
    """A convolutional stem, and tokens: between them and the second norm is a layer
    norm, which the state does not pass."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(not train)(nn.Conv(8, (2, 2), strides=(2, 2))(x)))
        n, h, w, c = x.shape
        x = x.reshape(n, h * w, c)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, h * w, c))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        y = nn.BatchNorm(not train)(nn.Dense(8)(x))
        x = x + nn.Dense(8)(nn.gelu(y))
        return nn.Dense(3)(x.mean(1))


class Upsampler(nn.Module):
    """A decoder that resizes, nearest and bilinear."""

    @nn.compact
    def __call__(self, x, train):
        for method in ("nearest", "bilinear"):
            n, h, w, _ = x.shape
            x = nn.Conv(4, (3, 3), padding="REFLECT")(x)
            x = nn.relu6(nn.BatchNorm(not train)(x))
            x = jax.image.resize(x, (n, 2 * h, 2 * w, 4), method)
        return nn.BatchNorm(not train)(nn.Conv(4, (3, 3))(x))
