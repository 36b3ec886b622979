"""Convolutions and dense layer: parameters and values are Flax's, and they predict."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kalman_flax._filter.convolution import predict_conv
from kalman_flax._filter.geometry import slide, transposed
from kalman_flax._filter.predict import predict_dense
from kalman_flax._filter.sampling import sample_conv, sample_dense
from kalman_flax._filter.state import KalmanState, check_choice, standard_deviation
from kalman_flax.layers.signal import Signal, is_concrete, map_size, through
from kalman_flax.layers.valid import slid

TRANSITIONS = ("closed_form", "monte_carlo")
RNG = "transition"  # the Flax RNG stream of the Monte Carlo transition


def standardize_kernel(kernel: jax.Array, epsilon: float = 1e-5) -> jax.Array:
    """Weight standardisation (Qiao et al., 2019): (W - mean) / (std + epsilon).

    Mean and standard deviation of each output feature, over the window and the input
    channels of ``[*window, C, D]``.
    """
    # Kernels of a single value, and those of zeros, have no spread.
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    std = standard_deviation(jnp.var(wide, _fan_in(kernel), keepdims=True))
    return (centre_kernel(wide) / (std + epsilon)).astype(kernel.dtype)


def centre_kernel(kernel: jax.Array) -> jax.Array:
    """Weight centring: W - mean, the mean of each output feature over the window and
    the input channels of ``[*window, C, D]``.

    With kernels of zero mean a constant input gives 0, which makes the predicted mean
    nearly exact. Unlike standardised ones they keep a length of their own, by which a
    residual network weighs its branches.
    """
    return kernel - jnp.mean(kernel, _fan_in(kernel), keepdims=True)


def _fan_in(kernel: jax.Array) -> tuple[int, ...]:
    return tuple(range(kernel.ndim - 1))


class Convolution(nn.Module):
    """Mixin: how convolutions map their kernel and predict. Its attributes are those of
    `Conv`, with the same meaning."""

    def used_kernel(self) -> jax.Array:
        """The kernel that convolves: the parameter behind `kernel_map` and `mask`."""
        kernel = self.map_kernel(self.get_variable("params", "kernel"))
        return kernel if self.mask is None else kernel * self.mask

    def map_kernel(self, kernel: jax.Array) -> jax.Array:
        """Applies `kernel_map`, if there is one, to ``[..., *window, C, D]``: each of
        the kernels that `nn.scan` stacks."""
        apply = self.kernel_map or (lambda kernel: kernel)
        for _ in range(kernel.ndim - 2 - np.size(self.kernel_size)):
            apply = jax.vmap(apply)
        return apply(kernel)

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A parameter as Flax's layer uses it: the kernel behind `kernel_map`."""
        value = super().param(name, *args, **kwargs)
        return self.map_kernel(value) if name == "kernel" else value

    def _predict(
        self,
        state: KalmanState,
        kernel: jax.Array,
        size: Sequence[int],
        **geometry: Any,
    ) -> KalmanState:
        move = predict_conv
        if self.transition == "monte_carlo":
            move = functools.partial(sample_conv, self.make_rng(RNG))
        bias = self.get_variable("params", "bias")
        return move(state, kernel, size, bias=bias, **geometry)


class Conv(Convolution, nn.Conv):
    """`nn.Conv` over a Signal: its attributes, parameters and values, and two more.

    In 1, 2, 3 or more dimensions. Where sizes are symbolic, as in an export, the state
    behind it is unknown.

    Attributes:
        kernel_map: convolve, and predict, with this function of the kernel, e.g.
            `standardize_kernel` or `centre_kernel`.
        transition: how the state is moved: ``"closed_form"``, or ``"monte_carlo"``, the
            paper's sampling, which needs an RNG named ``"transition"`` at `apply` (also
            in inference, where XLA drops what nobody uses).

    Raises:
        ValueError: the input has too few axes for the kernel, or its state other
            channels; a transition that is neither.
    """

    kernel_map: Callable[[jax.Array], jax.Array] | None = None
    transition: str = "closed_form"

    def __call__(self, inputs: Signal | jax.Array) -> Signal | jax.Array:
        """Maps ``[..., *map, C]`` to ``[..., *map', features]``."""
        check_choice("transition", self.transition, TRANSITIONS)
        size = map_size(inputs, self.kernel_size)

        def predict(state: KalmanState) -> KalmanState | None:
            if not is_concrete(size):
                return None
            return self._predict(
                state,
                self.used_kernel(),
                size,
                strides=self.strides,
                padding=self.padding,
                input_dilation=self.input_dilation,
                kernel_dilation=self.kernel_dilation,
                feature_group_count=self.feature_group_count,
            )

        def move_valid(valid: jax.Array) -> jax.Array:
            axes = slide(
                np.atleast_1d(self.kernel_size).tolist(),
                size,
                strides=self.strides,
                padding=self.padding,
                input_dilation=self.input_dilation,
                kernel_dilation=self.kernel_dilation,
            )
            return slid(valid, axes, self.padding)

        return through(inputs, super().__call__, predict, move_valid)


class ConvTranspose(Convolution, nn.ConvTranspose):
    """`nn.ConvTranspose` over a Signal: its attributes, parameters and values, and two
    more. To the filter it is a convolution of a map with zeros between its values.

    Attributes:
        kernel_map, transition: as in `Conv`.

    Raises:
        ValueError: as in `Conv`.
    """

    kernel_map: Callable[[jax.Array], jax.Array] | None = None
    transition: str = "closed_form"

    def __call__(self, inputs: Signal | jax.Array) -> Signal | jax.Array:
        """Maps ``[..., *map, C]`` to ``[..., *map', features]``."""
        check_choice("transition", self.transition, TRANSITIONS)
        size = map_size(inputs, self.kernel_size)

        def predict(state: KalmanState) -> KalmanState | None:
            if not is_concrete(size):
                return None
            kernel = self.used_kernel()
            if self.transpose_kernel:
                window = tuple(range(kernel.ndim - 2))
                kernel = jnp.flip(kernel, window).swapaxes(-1, -2)
            size_between, geometry = self._as_conv(size)
            return self._predict(state, kernel, size_between, **geometry)

        def move_valid(valid: jax.Array) -> jax.Array:
            size_between, geometry = self._as_conv(size)
            axes = slide(
                np.atleast_1d(self.kernel_size).tolist(), size_between, **geometry
            )
            return slid(valid, axes, self.padding)

        return through(inputs, super().__call__, predict, move_valid)

    def _as_conv(self, size: Sequence[int]) -> tuple[list[int], dict[str, Sequence]]:
        """It as a convolution, see `transposed`."""
        return transposed(
            np.atleast_1d(self.kernel_size).tolist(),
            size,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
        )

    def map_kernel(self, kernel: jax.Array) -> jax.Array:
        """The same, of kernels that may be ``[..., *window, D, C]``."""
        if not self.transpose_kernel:
            return super().map_kernel(kernel)
        return super().map_kernel(kernel.swapaxes(-1, -2)).swapaxes(-1, -2)


class Dense(nn.Dense):
    """`nn.Dense` over a Signal; its attributes and parameters, and `transition`.

    Attributes:
        transition: as in `Conv`.
    """

    transition: str = "closed_form"

    def __call__(self, inputs: Signal | jax.Array) -> Signal | jax.Array:
        """Maps ``[..., C]`` to ``[..., features]``."""
        check_choice("transition", self.transition, TRANSITIONS)

        def predict(state: KalmanState) -> KalmanState:
            kernel = self.get_variable("params", "kernel")
            bias = self.get_variable("params", "bias", 0.0)
            if self.transition == "closed_form":
                return predict_dense(state, kernel, bias)
            return sample_dense(self.make_rng(RNG), state, kernel, bias)

        return through(inputs, super().__call__, predict)
