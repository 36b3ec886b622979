"""A convolution as the transition matrix A of the filter (paper, Eq. 2, 5 and 7)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kalman_flax.state import KalmanState, for_channels

Padding = str | Sequence[tuple[int, int]]
_HIGHEST = lax.Precision.HIGHEST


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Padding = "SAME",
    kernel_dilation: Sequence[int] = (1, 1),
    feature_group_count: int = 1,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Convolves ``[N, H, W, C]`` with ``[h, w, C / groups, D]``."""
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=kernel_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=feature_group_count,
        precision=precision,
    )


def predict_conv(
    state: KalmanState,
    kernel: jax.Array,
    input_size: Sequence[int],
    *,
    strides: Sequence[int] = (1, 1),
    padding: Padding = "SAME",
    kernel_dilation: Sequence[int] = (1, 1),
    feature_group_count: int = 1,
    bias: jax.Array | None = None,
) -> KalmanState:
    """Moves a state through a 2-D convolution in closed form (Eq. 7, A = kernel).

    With P[h, w] the share of output positions at which tap (h, w) falls inside
    the input,

        mean = sum_hw P[h, w] mu . W[h, w]
        var  = sum_hw P[h, w] v . W[h, w]^2  +  variance over positions of local mean

    which is exact for inputs independent over positions and channels, zero padding
    included. It is what the paper's Monte Carlo estimate converges to.

    Args:
        state: ``[..., C]``, the moments of the input.
        kernel: ``[h, w, C / feature_group_count, D]``.
        input_size: height and width of the input map.
        strides, padding, kernel_dilation, feature_group_count: as in
            `jax.lax.conv_general_dilated`.
        bias: ``[D]``, added to the output.

    Returns:
        ``[..., D]``, the moments of the output over all its positions.

    Raises:
        ValueError: the state has another number of channels than the kernel, or the
            output would be empty.
    """
    kernel = jnp.asarray(kernel, jnp.float32)
    height, width, channels, features = kernel.shape
    groups = feature_group_count
    state = for_channels(state, channels * groups)
    if bias is None:
        bias = jnp.zeros((features,), jnp.float32)
    dilated = [(k - 1) * d + 1 for k, d in zip((height, width), kernel_dilation)]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(input_size, dilated, strides, padding)
    (rows, row_share), (cols, col_share) = (
        _kinds_of_position(*geometry)
        for geometry in zip(
            input_size, (height, width), strides, padding, kernel_dilation
        )
    )

    # g: group, c: channel of the group, o: feature of the group, a b: kind of position
    mean, var = (s.reshape(*s.shape[:-1], groups, channels) for s in state)
    kernel = kernel.reshape(height, width, channels, groups, features // groups)
    seen = jnp.einsum("ah,bw,hwcgo->abcgo", rows, cols, kernel, precision=_HIGHEST)
    local = jnp.einsum("...gc,abcgo->...abgo", mean, seen, precision=_HIGHEST)
    share = (row_share[:, None] * col_share)[:, :, None, None]
    power = jnp.einsum(
        "h,w,hwcgo->cgo",
        row_share @ rows,
        col_share @ cols,
        jnp.square(kernel),
        precision=_HIGHEST,
    )
    out_mean = jnp.sum(share * local, axis=(-4, -3))
    centred = local - out_mean[..., None, None, :, :]
    out_var = jnp.sum(share * jnp.square(centred), axis=(-4, -3))
    out_var += jnp.einsum("...gc,cgo->...go", var, power, precision=_HIGHEST)
    flat = (*out_mean.shape[:-2], features)
    return KalmanState(out_mean.reshape(flat) + bias, out_var.reshape(flat))


def _kinds_of_position(
    size: int, taps: int, stride: int, padding: tuple[int, int], dilation: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which taps of a kernel fall inside the input, along one axis of the map.

    Returns:
        inside: ``[kinds, taps]`` of 0 and 1, the distinct cases: for a 3-tap SAME
            kernel the first position, the last, and all between.
        share: ``[kinds]``, the share of output positions of each kind.
    """
    span = (taps - 1) * dilation + 1
    outputs = (size + sum(padding) - span) // stride + 1
    if outputs < 1:
        raise ValueError(
            f"a kernel of {taps} taps (dilation {dilation}) does not fit an input of"
            f" {size} positions with padding {tuple(padding)}: the output is empty."
        )
    index = np.arange(outputs)[:, None] * stride - padding[0]
    index = index + np.arange(taps) * dilation
    inside, counts = np.unique(
        (index >= 0) & (index < size), axis=0, return_counts=True
    )
    return inside.astype(np.float32), (counts / outputs).astype(np.float32)
