"""Layers without parameters: activations, pooling, dropout, concatenation and so on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kalman_flax._filter.geometry import positions, slide
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
from kalman_flax.layers.valid import both, slid


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
    for zeros at the border that count, see `kf.filter.predict_avg_pool`. To a window at
    the end of what is valid, the rest of the canvas is such zeros."""

    def average(value: jax.Array, count_include_pad: bool) -> jax.Array:
        return nn.avg_pool(
            value,
            window_shape,
            strides,
            padding,  # pyright: ignore[reportArgumentType]  # Flax: "str", but takes pairs
            count_include_pad,
        )

    def pool(value: jax.Array) -> jax.Array:
        valid = inputs.valid if isinstance(inputs, Signal) else None
        if valid is None or count_include_pad:
            pooled = average(value, count_include_pad)
        else:
            share = average(valid.astype(jnp.float32), True)
            pooled = average(value, True) / jnp.where(share > 0, share, 1)
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

    return through(
        inputs,
        pool,
        predict,
        lambda valid: _pooled_valid(valid, window_shape, strides, padding),
    )


def max_pool(
    inputs: SignalOrArray,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
) -> SignalOrArray:
    """`nn.max_pool`. The maximum of correlated values has no good closed form, so the
    state starts afresh: the observed moments of the pooled map, ``[C]``, or ``[N, C]``
    where the state is one of each example, which must not see the others.

    Windows of padding alone, which have no maximum, do not count. Where only a part of
    a Signal is valid, they are not valid; otherwise they are -inf, as Flax has them.
    """

    def pool(value: jax.Array) -> jax.Array:
        return nn.max_pool(value, window_shape, strides, padding)  # pyright: ignore[reportArgumentType]  # Flax: "str", but takes pairs

    if not isinstance(inputs, Signal):
        return pool(inputs)  # pyright: ignore[reportReturnType]  # as x is
    pooled = pool(inputs.filled(-jnp.inf))
    valid, counts = inputs.valid, None
    if valid is not None:
        reached = pool(valid.astype(jnp.float32)) > 0
        valid = counts = reached & _pooled_valid(valid, window_shape, strides, padding)
    elif _has_empty_windows(inputs, window_shape, strides, padding):
        counts = pooled > -jnp.inf
    result = Signal(pooled, valid=valid)
    of_examples = inputs.state is not None and jnp.ndim(inputs.state.mean) > 1
    over = "instance" if of_examples else "batch"
    return result.replace(state=observe(result.value, over, mask=counts))  # pyright: ignore[reportReturnType]  # as x is


def _pooled_valid(
    valid: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: str | Sequence[tuple[int, int]],
) -> jax.Array:
    """Where a pooled map is valid, see `slid`."""
    size = map_size(valid, window_shape)
    axes = slide(window_shape, size, strides=strides, padding=padding)
    return slid(valid, axes, padding)


def _has_empty_windows(
    x: Signal,
    window_shape: Sequence[int],
    strides: Sequence[int] | None,
    padding: str | Sequence[tuple[int, int]],
) -> bool:
    """Whether a window can lie in the padding with all its taps."""
    size = map_size(x, window_shape)
    if isinstance(padding, str) or not is_concrete(size):
        return False  # of paddings in words no window does
    axes = slide(window_shape, size, strides=strides, padding=padding)
    return not positions(axes).inside.any(axis=1).all()


def global_avg_pool(x: SignalOrArray) -> SignalOrArray:
    """Mean over height and width, ``[..., H, W, C]`` to ``[..., C]``; ends the filter:
    the variance of such a mean is that between images, of which the state says nothing.
    Of what is valid, where that is known, and 0 where nothing is.
    """
    if isinstance(x, Signal):
        return x.mean((-3, -2))  # pyright: ignore[reportReturnType]  # as x is
    return jnp.mean(x, (-3, -2))  # pyright: ignore[reportReturnType]  # as x is


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

    Joined channels have a state where all branches have, and are valid where all are.
    Along another axis values of different moments come together: the state is unknown.
    """
    signals = [as_signal(x) for x in xs]
    value = jnp.concatenate([s.value for s in signals], axis=axis, dtype=dtype)
    if not any(isinstance(x, Signal) for x in xs):
        return value  # pyright: ignore[reportReturnType]  # as x is
    of_channels = axis in (-1, value.ndim - 1)
    valid = _joined_valid(signals, None if of_channels else axis)
    if not of_channels or any(s.state is None for s in signals):
        return Signal(value, valid=valid)  # pyright: ignore[reportReturnType]  # as x is
    known = [s for s in map(state_of, signals) if s is not None]  # all of them
    return Signal(value, predict_concatenate(known), valid)  # pyright: ignore[reportReturnType]  # as x is


def _joined_valid(signals: Sequence[Signal], axis: int | None) -> jax.Array | None:
    """Where signals are valid that are joined along `axis`, or along the channels."""
    if all(s.valid is None for s in signals):
        return None
    if axis is None:
        return functools.reduce(both, [s.valid for s in signals])
    ones = [jnp.ones((*s.shape[:-1], 1), bool) for s in signals]
    whole = [one if s.valid is None else s.valid for s, one in zip(signals, ones)]
    return jnp.concatenate(whole, axis)


def resize(
    image: SignalOrArray,
    shape: Sequence[int],
    method: str | jax.image.ResizeMethod,
    antialias: bool = True,
    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST,
) -> SignalOrArray:
    """`jax.image.resize`, e.g. ``resize(x, (n, 2 * h, 2 * w, c), "nearest")``.

    Every method is an average over neighbours, which count as alike, so that the state
    stays as it is, see `kf.filter.predict_average`; by ``"nearest"``, to whole
    multiples, it is exact. Not where channels are resized.

    Raises:
        ValueError: not all is valid, and the method is another than ``"nearest"``.
    """
    whole_channels = shape[-1] == image.shape[-1]

    def move_valid(valid: jax.Array) -> jax.Array:
        nearest = jax.image.ResizeMethod.NEAREST
        by = method
        if isinstance(by, str):
            by = jax.image.ResizeMethod.from_string(by)
        if by != nearest or not whole_channels:
            raise ValueError(
                f"resize by {method!r} to {tuple(shape)} mixes what is valid with what"
                ' is not; take "nearest", and leave the channels as they are.'
            )
        size = (*shape[:-1], 1)
        return jax.image.resize(valid.astype(jnp.float32), size, nearest) > 0

    return through(
        image,
        lambda value: jax.image.resize(value, shape, method, antialias, precision),
        lambda state: state if whole_channels else None,
        move_valid,
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
