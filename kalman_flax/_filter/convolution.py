"""A convolution as the transition matrix A of the filter (paper, Eq. 2, 5 and 7)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kalman_flax._filter.geometry import Axis, Padding, PerAxis, positions, slide
from kalman_flax._filter.state import KalmanState, aligned, for_channels
from kalman_flax._kernels import mean_and_spread, tap_products, weighted_sum


def predict_conv(
    state: KalmanState,
    kernel: Float[Array, "*window C_per_group D"],
    input_size: Sequence[int],
    *,
    strides: PerAxis = 1,
    padding: Padding = "SAME",
    input_dilation: PerAxis = 1,
    kernel_dilation: PerAxis = 1,
    feature_group_count: int = 1,
    bias: Float[Array, " D"] | None = None,
) -> KalmanState:
    """Moves a state through a convolution in closed form (Eq. 7, A = kernel).

    With P[t] the share of output positions at which tap t of the window falls on a
    value of the map, and not on a zero around or between,

        mean = sum_t P[t] mu . W[t]
        var  = sum_t P[t] v . W[t]^2  +  variance over positions of the local mean

    which is exact for inputs independent over positions and channels, zero padding
    included. It is what the paper's Monte Carlo estimate converges to. A transposed
    convolution is one with `input_dilation`.

    Args:
        state: ``[..., C]``, the moments of the input.
        kernel: of ``C_per_group = C / feature_group_count``, for maps of 1, 2, 3 or
            more axes.
        input_size: positions of the input map, one number for each axis.
        strides: an integer, or one for each axis.
        padding: ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"``, ``"CAUSAL"``,
            ``"CIRCULAR"``, ``"REFLECT"`` (the last two with each tap taken as a value
            of its own), an integer, or an integer or pair for each axis.
        input_dilation, kernel_dilation: like `strides`; the first, ``lhs_dilation`` in
            `jax.lax.conv_general_dilated`, puts zeros between the values of the map.
        feature_group_count: as in `jax.lax.conv_general_dilated`.
        bias: added to the output.

    Returns:
        float32 ``[..., D]``, the moments of the output over all its positions.

    Raises:
        ValueError: the state has another number of channels than the kernel, sizes or
            padding do not fit the window, or the output would be empty.
    """
    kernel = jnp.asarray(kernel, jnp.float32)
    *taps, channels, features = kernel.shape
    axes = slide(
        taps,
        input_size,
        strides=strides,
        padding=padding,
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
    )
    share, spread = _over_positions(axes)
    mean, var = for_channels(state, channels * feature_group_count)
    kernel = kernel.reshape(-1, channels, features)
    means = tap_products(mean, kernel, feature_group_count)
    variances = tap_products(var, jnp.square(kernel), feature_group_count)
    var = weighted_sum(share, variances)
    if np.any(spread):
        mean, of_local_mean = mean_and_spread(means, share, spread)
        var = var + of_local_mean
    else:
        mean = weighted_sum(share, means)
    if bias is not None:
        mean = sum(aligned(mean, bias))
    return KalmanState(mean, var)


def _over_positions(axes: Sequence[Axis]) -> tuple[np.ndarray, np.ndarray]:
    """Returns P ``[taps]`` and K ``[taps, taps]``, of which follow the mean and the
    variance over positions of the local mean.

    That is the sum of m_t = mu . W_t over the taps t inside. Its mean is P . m, its
    variance m' K m, with K the covariance of being inside.
    """
    inside, share = positions(axes)
    p = share @ inside
    away = inside - p
    spread = away.T @ (share[:, None] * away)
    return p.astype(np.float32), spread.astype(np.float32)
