"""MBConv blocks: depthwise convolution, squeeze-and-excite, stochastic depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class SqueezeExcite(nn.Module):
    reduced: int

    @nn.compact
    def __call__(self, x):
        s = jnp.mean(x, axis=(1, 2), keepdims=True)
        s = nn.swish(nn.Conv(self.reduced, (1, 1))(s))
        return x * nn.sigmoid(nn.Conv(x.shape[-1], (1, 1))(s))


class MBConv(nn.Module):
    features: int
    expand: int = 4
    strides: int = 1
    drop_rate: float = 0.2

    @nn.compact
    def __call__(self, inputs, train):
        def norm(x):
            return nn.BatchNorm(not train, momentum=0.99, epsilon=1e-3)(x)

        width = inputs.shape[-1] * self.expand
        x = nn.swish(norm(nn.Conv(width, (1, 1), use_bias=False)(inputs)))
        x = nn.Conv(
            width, (3, 3), self.strides, feature_group_count=width, use_bias=False
        )(x)
        x = nn.swish(norm(x))
        x = SqueezeExcite(max(1, inputs.shape[-1] // 4))(x)
        x = norm(nn.Conv(self.features, (1, 1), use_bias=False)(x))
        if x.shape == inputs.shape:
            if train and self.drop_rate:
                keep = 1.0 - self.drop_rate
                shape = (x.shape[0], 1, 1, 1)
                mask = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
                x = x / keep * mask.astype(x.dtype)
            x = x + inputs
        return x


class EfficientNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), 2, use_bias=False)(x)
        x = nn.swish(nn.BatchNorm(not train)(x))
        x = MBConv(4)(x, train)
        x = MBConv(8, strides=2)(x, train)
        x = nn.swish(nn.BatchNorm(not train)(nn.Conv(8, (1, 1))(x)))
        x = nn.Dropout(0.2, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(3)(x)
