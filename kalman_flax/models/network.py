"""What all networks share: their arguments, how they start, and how they end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kalman_flax._filter.state import KalmanState
from kalman_flax.layers.functions import global_avg_pool, relu
from kalman_flax.layers.kalman_norm import KalmanNorm
from kalman_flax.layers.linear import Conv, Dense
from kalman_flax.layers.remat import remat
from kalman_flax.layers.signal import Signal, as_signal

#: of kernels before a rectifier (He et al., 2015)
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Layers(NamedTuple):
    """What a network is built of.

    Attributes:
        norm: factory of the normaliser; gets ``name``.
        conv: factory of the convolutions.
        activation: what follows each norm.
    """

    norm: Callable[..., nn.Module]
    conv: Callable[..., nn.Module]
    activation: Callable[[Signal], Signal]

    def conv_norm(
        self,
        x: Signal,
        features: int,
        kernel_size: int,
        *,
        strides: int = 1,
        name: str,
        **norm_options: Any,
    ) -> Signal:
        """A convolution ``name`` and its norm ``name_norm``, without activation.

        Pads by half the kernel on every side, as Caffe and PyTorch do: at stride 2,
        ``"SAME"`` would look at other pixels.
        """
        conv = self.conv(
            features,
            (kernel_size,) * 2,
            strides=strides,
            padding=kernel_size // 2,
            name=name,
        )
        return self.norm(name=f"{name}_norm", **norm_options)(conv(x))

    def conv_norm_activation(self, x: Signal, *args: Any, **kwargs: Any) -> Signal:
        """The same, then the activation."""
        return self.activation(self.conv_norm(x, *args, **kwargs))


class Normalized(nn.Module, kw_only=True):
    """Base of all networks: what they are told of their normaliser.

    Attributes:
        norm: factory of the normaliser, e.g. ``functools.partial(KalmanNorm,
            momentum=0.9)``; it gets ``use_running_average`` and ``name``.
        conv: factory of the convolutions, `Conv` with options.
        input_state: what the filter knows of the images where they come as a plain
            array: (0, 1) for standardised ones, None for nothing.
        activation: what follows each norm; the identity for a norm with a nonlinearity
            of its own.
        dtype: of the computation; parameters, statistics and what comes out stay
            float32.
        remat: compute norms and activations again in the backward pass, block by block,
            in place of keeping them; see `kalman_flax.remat`.
    """

    norm: Callable[..., nn.Module] = KalmanNorm
    conv: Callable[..., nn.Module] = Conv
    input_state: KalmanState | None = KalmanState(0.0, 1.0)
    activation: Callable[[Signal], Signal] = relu
    dtype: Any = jnp.float32
    remat: bool = False

    def _layers(self, use_running_average: bool) -> Layers:
        """What to build of, to train or to infer."""
        norm = functools.partial(
            self.norm, use_running_average=use_running_average, dtype=self.dtype
        )
        conv = functools.partial(
            self.conv, use_bias=False, dtype=self.dtype, kernel_init=he_normal
        )
        return Layers(norm, conv, self.activation)

    def _block(self, block: type[nn.Module]) -> type[nn.Module]:
        """The class to make a network's blocks of."""
        return remat(block) if self.remat else block


class Network(Normalized, kw_only=True):
    """Base of the networks that map images to logits. Its attributes are those of
    `Normalized`."""

    @nn.compact
    def __call__(
        self, images: Signal | jax.Array, use_running_average: bool
    ) -> jax.Array:
        """Maps ``[N, H, W, channels]`` to logits ``[N, num_classes]``, float32.

        Args:
            images: a plain array, or a Signal that brings its own state.
            use_running_average: True for inference by moving statistics (option A).
        """
        if not isinstance(images, Signal):
            images = Signal(images, self.input_state)
        x = self._features(images, self._layers(use_running_average))
        head = Dense(self.num_classes, name="head")
        return as_signal(head(self._pooled(x))).value.astype(jnp.float32)

    def _features(self, x: Signal, layers: Layers) -> Signal:
        """Maps the images to the last maps, ``[N, H, W, C]``."""
        raise NotImplementedError

    def _pooled(self, x: Signal) -> Signal:
        """Maps those to what logits are of: to ``[N, C]``, one of each image."""
        return global_avg_pool(x)
