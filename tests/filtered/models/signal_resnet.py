"""The network of `resnet` with Signals, by the same names."""

import functools

import flax.linen as nn

import kalman_flax as kf


class ResNetBlock(nn.Module):
    filters: int
    strides: int
    conv: object
    norm: object

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.filters, (3, 3), self.strides, name="Conv_0")(x)
        y = kf.relu(self.norm(name="BatchNorm_0")(y))
        y = self.conv(self.filters, (3, 3), name="Conv_1")(y)
        y = self.norm(name="BatchNorm_1")(y)
        if x.value.shape != y.value.shape:
            x = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return kf.relu(x + y)


class ResNet(nn.Module):
    stage_sizes: tuple[int, ...] = (1, 1)
    filters: int = 4
    num_classes: int = 3
    options: tuple = ()
    kernel_map: object = None

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(kf.Conv, use_bias=False, kernel_map=self.kernel_map)
        norm = functools.partial(
            kf.KalmanNorm, not train, momentum=0.9, **dict(self.options)
        )
        x = kf.Signal(x, kf.KalmanState(0.0, 1.0))
        x = kf.relu(
            norm(name="bn_init")(conv(self.filters, (3, 3), name="conv_init")(x))
        )
        x = kf.avg_pool(x, (2, 2), strides=(2, 2))
        index = 0
        for i, size in enumerate(self.stage_sizes):
            for j in range(size):
                strides = 2 if i > 0 and j == 0 else 1
                x = ResNetBlock(
                    self.filters * 2**i,
                    strides,
                    conv,
                    norm,
                    name=f"ResNetBlock_{index}",
                )(x)
                index += 1
        return kf.Dense(self.num_classes, name="Dense_0")(kf.global_avg_pool(x)).value
