"""A convolution as the transition matrix A of the filter (paper, Eq. 2, 5 and 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kalman_flax._filter.state import KalmanState, check_choice, for_channels

Padding = str | Sequence[tuple[int, int]]
PADDINGS = ("SAME", "SAME_LOWER", "VALID")


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
    mean, var = for_channels(state, channels * groups)
    if isinstance(padding, str):
        check_choice("padding", padding, PADDINGS)
        axes = zip((height, width), kernel_dilation)
        spans = [(size - 1) * dilation + 1 for size, dilation in axes]
        padding = lax.padtype_to_pads(input_size, spans, strides, padding)
    rows, cols = (
        _kinds_of_position(*axis)
        for axis in zip(input_size, (height, width), strides, padding, kernel_dilation)
    )
    inside = np.kron(rows.inside, cols.inside)  # [kinds of position, taps]
    share = np.kron(rows.share, cols.share)
    # The local mean is the sum of m_t = mu . W_t over the taps t inside. Over positions
    # its mean is P . m, its variance m' K m, with K the covariance of being inside.
    p = share @ inside
    k = (inside - p).T @ (share[:, None] * (inside - p))

    def by_tap(stat: jax.Array, kernel: jax.Array) -> jax.Array:
        """Returns stat . kernel of each tap, ``[..., taps, D]``."""
        out = lax.platform_dependent(
            stat.reshape(*stat.shape[:-1], groups, channels),
            kernel.reshape(height * width, channels, groups, features // groups),
            cpu=_tap_by_tap,
            default=_all_taps,
        )
        return out.reshape(*out.shape[:-2], features)

    means, variances = by_tap(mean, kernel), by_tap(var, jnp.square(kernel))
    if np.any(k):
        mean, var = _over_positions(means, variances, jnp.float32(p), jnp.float32(k))
    else:
        mean, var = _weigh(jnp.float32(p), means), _weigh(jnp.float32(p), variances)
    return KalmanState(mean if bias is None else mean + bias, var)


def _all_taps(stat: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[..., groups, C / groups]`` and ``[taps, C / groups, groups, D / groups]`` to
    ``[..., taps, groups, D / groups]``."""
    return jnp.einsum(
        "...gc,tcgo->...tgo", stat, kernel, precision=lax.Precision.HIGHEST
    )


def _tap_by_tap(stat: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same by a product for each tap and group, with the kernel on the right: for
    the other XLA:CPU keeps a transposed copy of the kernel, and another of its square.
    On a GPU this one takes 3 to 10 % more kernels."""
    taps, channels, groups, features = kernel.shape
    states = stat.reshape(-1, groups, channels).swapaxes(0, 1)
    out = jnp.matmul(
        jnp.tile(states, (taps, 1, 1)),
        kernel.swapaxes(1, 2).reshape(taps * groups, channels, features),
        precision=lax.Precision.HIGHEST,
    )
    out = jnp.moveaxis(out.reshape(taps, groups, -1, features), 2, 0)
    return out.reshape(*stat.shape[:-2], taps, groups, features)


@jax.custom_jvp
def _over_positions(
    m: jax.Array, v: jax.Array, p: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """P . m, and P . v + m' K m, of each feature: m and v are ``[..., taps, D]``."""
    mean, weighed = _mean_and_weighed(m, p, k)
    spread = jnp.sum(m * weighed, axis=-2)
    return mean, _weigh(p, v) + jnp.maximum(spread, 0.0)  # below 0 by rounding alone


@_over_positions.defjvp
def _over_positions_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """d(m' K m) = 2 (K m)' dm, as K is symmetric: no second product for gradients."""
    (m, _, p, k), (d_m, d_v, *_) = primals, tangents  # P and K are constants
    _, weighed = _mean_and_weighed(m, p, k)
    d_var = _weigh(p, d_v) + jnp.sum(2.0 * weighed * d_m, axis=-2)
    return _over_positions(*primals), (_weigh(p, d_m), d_var)


def _mean_and_weighed(
    m: jax.Array, p: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns P . m and K m, by one product for a kernel less on a GPU."""
    both = _weigh(jnp.stack([p, *k]), m[..., None, :, :])
    return both[..., 0, :], both[..., 1:, :]


def _weigh(weights: jax.Array, taps: jax.Array) -> jax.Array:
    """Sums ``[..., taps, D]`` up by weights ``[..., taps]``: not a product, which would
    be a kernel by itself."""
    return jnp.sum(weights[..., None] * taps, axis=-2)


class _Kinds(NamedTuple):
    inside: np.ndarray  # [kinds, taps], 0 or 1
    share: np.ndarray  # [kinds], sums to 1


def _kinds_of_position(
    size: int, taps: int, stride: int, padding: tuple[int, int], dilation: int
) -> _Kinds:
    """Which taps of a kernel fall inside the input, along one axis of the map.

    Returns the distinct cases (for a 3-tap SAME kernel: the first position, the last,
    and all between) and the share of output positions of each.
    """
    span = (taps - 1) * dilation + 1
    outputs = (size + sum(padding) - span) // stride + 1
    if outputs < 1:
        raise ValueError(
            f"a kernel of {taps} taps (dilation {dilation}) does not fit an input of"
            f" {size} positions with padding {tuple(padding)}: the output is empty."
        )
    first = np.arange(outputs)[:, None] * stride - padding[0]
    index = first + np.arange(taps) * dilation
    inside, counts = np.unique(
        (index >= 0) & (index < size), axis=0, return_counts=True
    )
    return _Kinds(inside.astype(float), counts / outputs)
