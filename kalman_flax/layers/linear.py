"""Convolution and dense layer: parameters and values as in Flax, and they predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.linear import canonicalize_padding

from kalman_flax._filter.convolution import PADDINGS, Padding, convolve, predict_conv
from kalman_flax._filter.predict import predict_dense
from kalman_flax._filter.sampling import sample_conv, sample_dense
from kalman_flax._filter.state import KalmanState, check_choice, standard_deviation
from kalman_flax.layers.signal import Signal, through

TRANSITIONS = ("closed_form", "monte_carlo")
RNG = "transition"  # the Flax RNG stream of the Monte Carlo transition
_FAN_IN = (-4, -3, -2)  # height, width and input channels of a kernel


def standardize_kernel(kernel: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Weight standardisation (Qiao et al., 2019): (W - mean) / (std + epsilon).

    Mean and standard deviation of each output feature, over height, width and input
    channels of ``[..., h, w, C, D]``.
    """
    # Kernels of a single value, and those of zeros, have no spread.
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    std = standard_deviation(jnp.var(wide, _FAN_IN, keepdims=True))
    return (centre_kernel(wide) / (std + epsilon)).astype(kernel.dtype)


def centre_kernel(kernel: jax.Array) -> jax.Array:
    """Weight centring: W - mean, the mean of each output feature over height, width and
    input channels of ``[..., h, w, C, D]``.

    With kernels of zero mean a constant input gives 0, which makes the predicted mean
    nearly exact. Unlike standardised ones they keep a length of their own, by which a
    residual network weighs its branches.
    """
    return kernel - jnp.mean(kernel, _FAN_IN, keepdims=True)


class Conv(nn.Module):
    """2-D convolution over a Signal; `nn.Conv` on a plain array.

    Attributes mean what they do in `nn.Conv`, of which ``mask``, ``input_dilation`` and
    paddings other than zeros are missing, and so do the parameters: ``kernel``
    ``[h, w, C / groups, features]`` and ``bias`` ``[features]``. Besides:

    Attributes:
        kernel_map: convolve, and predict, with this function of the kernel, e.g.
            `standardize_kernel` or `centre_kernel`.
        transition: how the state is moved: ``"closed_form"``, or ``"monte_carlo"``, the
            paper's sampling, which needs an RNG named ``"transition"`` at `apply` (also
            in inference, where XLA drops what nobody uses).

    Raises:
        ValueError: the input has no height and width, or its state other channels; a
            padding that is not of zeros.
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME"
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    kernel_map: Callable[[jax.Array], jax.Array] | None = None
    transition: str = "closed_form"

    @nn.compact
    def __call__(self, x: Signal | jax.Array) -> Signal | jax.Array:
        """Maps ``[..., H, W, C]`` to ``[..., H', W', features]``."""
        check_choice("transition", self.transition, TRANSITIONS)
        shape = jnp.shape(x.value if isinstance(x, Signal) else x)
        if len(shape) < 3 or np.shape(self.kernel_size) != (2,):
            raise ValueError(
                f"Conv got an input of shape {shape} and kernel_size"
                f" {self.kernel_size}; expected [..., H, W, C] and two numbers."
            )
        channels = shape[-1] // self.feature_group_count
        kernel = self.param(
            "kernel",
            self.kernel_init,
            (*self.kernel_size, channels, self.features),
            self.param_dtype,
        )
        bias = None
        if self.use_bias:
            bias = self.param(
                "bias", self.bias_init, (self.features,), self.param_dtype
            )
        if self.kernel_map is not None:
            kernel = self.kernel_map(kernel)
        geometry = dict(
            strides=_pair(self.strides),
            padding=_zeros_around(self.padding),
            kernel_dilation=_pair(self.kernel_dilation),
            feature_group_count=self.feature_group_count,
        )

        def move_value(value: jax.Array) -> jax.Array:
            value, w, b = nn.dtypes.promote_dtype(value, kernel, bias, dtype=self.dtype)
            batch = value.shape[:-3]
            value = value.reshape(-1, *value.shape[-3:])
            value = convolve(value, w, **geometry, precision=self.precision)
            value = value.reshape(*batch, *value.shape[1:])
            return value if b is None else value + b

        def predict(state: KalmanState) -> KalmanState:
            size = shape[-3:-1]
            if self.transition == "closed_form":
                return predict_conv(state, kernel, size, **geometry, bias=bias)
            return sample_conv(
                self.make_rng(RNG),
                state,
                kernel,
                size,
                **geometry,
                bias=0.0 if bias is None else bias,
            )

        return through(x, move_value, predict)


class Dense(nn.Dense):
    """`nn.Dense` over a Signal; its attributes and parameters, and `transition`.

    Attributes:
        transition: as in `Conv`.
    """

    transition: str = "closed_form"

    def __call__(self, x: Signal | jax.Array) -> Signal | jax.Array:
        """Maps ``[..., C]`` to ``[..., features]``."""
        check_choice("transition", self.transition, TRANSITIONS)

        def predict(state: KalmanState) -> KalmanState:
            kernel = self.get_variable("params", "kernel")
            bias = self.get_variable("params", "bias", 0.0)
            if self.transition == "closed_form":
                return predict_dense(state, kernel, bias)
            return sample_dense(self.make_rng(RNG), state, kernel, bias)

        return through(x, super().__call__, predict)


def _pair(value: int | Sequence[int] | None) -> tuple[int, int]:
    if value is None or isinstance(value, int):
        return (value or 1,) * 2
    return tuple(value)


def _zeros_around(padding: Any) -> Padding:
    if isinstance(padding, str):
        check_choice("padding", padding.upper(), PADDINGS)
        return padding.upper()
    return canonicalize_padding(padding, 2)
