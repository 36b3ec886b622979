"""Layers without parameters: activations, pooling, dropout, concatenation and so on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kalman_flax._filter.observe import observe
from kalman_flax._filter.pool import predict_avg_pool
from kalman_flax._filter.predict import (
    pad_last_axis,
    predict_concatenate,
    predict_dropout,
    predict_pad_channels,
    predict_pointwise,
    predict_relu,
)
from kalman_flax._filter.state import KalmanState
from kalman_flax.layers.signal import (
    Signal,
    SignalOrArray,
    as_signal,
    is_concrete,
    map_size,
    state_of,
    through,
)


def relu(x: SignalOrArray) -> SignalOrArray:
    """max(x, 0); moments of a rectified Gaussian in closed form."""
    return through(x, jax.nn.relu, predict_relu)


def activation(
    fn: Callable[[jax.Array], jax.Array], order: int = 32
) -> Callable[[Any], Any]:
    """Returns pointwise `fn` as a layer, e.g. ``activation(nn.gelu)(x)``.

    The state moves by Gauss-Hermite quadrature with `order` nodes.
    """
    return lambda x: through(x, fn, lambda s: predict_pointwise(s, fn, order))


def avg_pool(
    inputs: SignalOrArray,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
    count_include_pad: bool = True,
) -> SignalOrArray:
    """`nn.avg_pool`; neighbours count as alike, so that the state stays as it is, but
    for zeros at the border that count, see `kf.filter.predict_avg_pool`."""

    def pool(value: jax.Array) -> jax.Array:
        pooled = nn.avg_pool(
            value,
            window_shape,
            strides,
            padding,  # pyright: ignore[reportArgumentType]  # Flax: "str", but takes pairs
            count_include_pad,
        )
        return pooled.astype(value.dtype)  # the count of values is a float32 to Flax

    def predict(state: KalmanState) -> KalmanState | None:
        size = map_size(inputs, window_shape)
        if not is_concrete(size):
            return None
        return predict_avg_pool(
            state,
            window_shape,
            size,
            strides=strides,
            padding=padding,
            count_include_pad=count_include_pad,
        )

    return through(inputs, pool, predict)


def max_pool(
    inputs: SignalOrArray,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
) -> SignalOrArray:
    """`nn.max_pool`. The maximum of correlated values has no good closed form, so the
    state starts afresh: the observed moments of the pooled map, ``[C]``, or ``[N, C]``
    where the state is one of each example, which must not see the others."""
    pooled = nn.max_pool(
        as_signal(inputs).value,
        window_shape,
        strides,
        padding,  # pyright: ignore[reportArgumentType]  # Flax: "str", but takes pairs
    )
    if not isinstance(inputs, Signal):
        return pooled  # pyright: ignore[reportReturnType]  # as x is
    of_examples = inputs.state is not None and jnp.ndim(inputs.state.mean) > 1
    state = observe(pooled, "instance" if of_examples else "batch")
    return Signal(pooled, state)  # pyright: ignore[reportReturnType]  # as x is


def global_avg_pool(x: SignalOrArray) -> SignalOrArray:
    """Mean over height and width, ``[..., H, W, C]`` to ``[..., C]``; ends the filter:
    the variance of such a mean is that between images, of which the state says nothing.
    """
    pooled = jnp.mean(as_signal(x).value, axis=(-3, -2))
    result = Signal(pooled, None) if isinstance(x, Signal) else pooled
    return result  # pyright: ignore[reportReturnType]  # the type is that of x


def pad_channels(x: SignalOrArray, before: int, after: int) -> SignalOrArray:
    """Adds channels of zeros, as the parameter-free shortcut of a CIFAR ResNet does."""
    return through(
        x,
        lambda value: pad_last_axis(value, before, after),
        lambda s: predict_pad_channels(s, before, after),
    )


def concatenate(
    xs: Sequence[SignalOrArray], axis: int = -1, dtype: Any = None
) -> SignalOrArray:
    """`jnp.concatenate`, but along the channels where no axis is given.

    Joined channels have a state where all branches have. Along another axis values of
    different moments come together: the state is unknown.
    """
    signals = [as_signal(x) for x in xs]
    value = jnp.concatenate([s.value for s in signals], axis=axis, dtype=dtype)
    if not any(isinstance(x, Signal) for x in xs):
        return value  # pyright: ignore[reportReturnType]  # as x is
    of_channels = axis in (-1, value.ndim - 1)
    if not of_channels or any(s.state is None for s in signals):
        return Signal(value)  # pyright: ignore[reportReturnType]  # as x is
    known = [s for s in map(state_of, signals) if s is not None]  # all of them
    return Signal(value, predict_concatenate(known))  # pyright: ignore[reportReturnType]  # as x is


def resize(
    image: SignalOrArray,
    shape: Sequence[int],
    method: str | jax.image.ResizeMethod,
    antialias: bool = True,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
) -> SignalOrArray:
    """`jax.image.resize`, e.g. ``resize(x, (n, 2 * h, 2 * w, c), "nearest")``.

    Every method is an average over neighbours, which count as alike, so that the state
    stays as it is, see `kf.filter.predict_average`. Not where channels are resized.
    """
    return through(
        image,
        lambda value: jax.image.resize(value, shape, method, antialias, precision),
        lambda state: state if shape[-1] == image.shape[-1] else None,
    )


class Dropout(nn.Dropout):
    """`nn.Dropout` over a Signal: its attributes, RNG and values. In exact moments."""

    def __call__(
        self,
        inputs: SignalOrArray,
        deterministic: bool | None = None,
        rng: jax.Array | None = None,
    ) -> SignalOrArray:
        """Drops values of ``[..., C]``, each or along `broadcast_dims` together."""
        kept = nn.merge_param("deterministic", self.deterministic, deterministic)
        drop = super().__call__
        return through(
            inputs,
            lambda value: drop(value, deterministic, rng),
            lambda state: state if kept else predict_dropout(state, self.rate),
        )
