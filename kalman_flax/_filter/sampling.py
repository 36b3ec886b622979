"""The paper's Monte Carlo transition (section 3.2, after Eq. 7).

"Some data y ~ N(mu, Sigma) is first sampled. Then, y is convolved with the transition
matrix A to obtain A y. Finally, [the predictions] are obtained by calculating the mean
and the variance of A y." Unbiased for the mean up to sampling noise, and costing about
one more example per micro-batch, where the closed forms cost next to nothing. Gradients
flow through the samples (reparametrised) and through the kernel.

The state is ``[C]`` here, and anything else a ValueError; `jax.vmap` over leading axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from kalman_flax._filter.geometry import Axis, Padding, PerAxis, slide
from kalman_flax._filter.observe import observe
from kalman_flax._filter.state import KalmanState, for_channels, standard_deviation


def sample_conv(
    key: PRNGKeyArray,
    state: KalmanState,
    kernel: Float[Array, "*window C_per_group D"],
    input_size: Sequence[int],
    *,
    padding: Padding = "SAME",
    feature_group_count: int = 1,
    bias: Float[Array, " D"] | None = None,
    **geometry: PerAxis,
) -> KalmanState:
    """Moves a state through a convolution by sampling a map, one as in the paper.

    Args:
        key: PRNG key.
        state: ``[C]``.
        kernel: of ``C_per_group = C / feature_group_count``.
        input_size: of the map drawn, one number for each axis.
        bias: added to the output.
        padding, feature_group_count, **geometry: strides, input_dilation and
            kernel_dilation, as in `predict_conv`.

    Returns:
        ``[D]``, the moments of the sampled output over its positions.
    """
    kernel = jnp.asarray(kernel, jnp.float32)
    *taps, channels, _ = kernel.shape
    axes = slide(taps, input_size, padding=padding, **geometry)
    shape = (1, *(axis.size for axis in axes), channels * feature_group_count)
    y = _convolve(_draw(key, state, shape), kernel, axes, feature_group_count)
    mean, var = observe(y)
    return KalmanState(mean if bias is None else mean + bias, var)


def _convolve(
    x: jax.Array, kernel: jax.Array, axes: Sequence[Axis], feature_group_count: int
) -> jax.Array:
    """Convolves ``[N, *map, C]`` with ``[*window, C / groups, D]``."""
    rank = x.ndim - 2
    last = (0, rank + 1, *range(1, rank + 1))  # channels last
    return lax.conv_general_dilated(
        x,
        kernel,
        [axis.stride for axis in axes],
        [axis.padding for axis in axes],
        lhs_dilation=[axis.input_dilation for axis in axes],
        rhs_dilation=[axis.kernel_dilation for axis in axes],
        dimension_numbers=lax.ConvDimensionNumbers(
            last, (rank + 1, rank, *range(rank)), last
        ),
        feature_group_count=feature_group_count,
    )


def sample_dense(
    key: PRNGKeyArray,
    state: KalmanState,
    kernel: Float[Array, "C D"],
    bias: Float[Array, " D"] | float = 0.0,
    *,
    num_samples: int = 256,
) -> KalmanState:
    """Moves a state ``[C]`` through ``x @ kernel + bias`` by sampling vectors."""
    y = _draw(key, state, (num_samples, kernel.shape[0]))
    mean, var = observe(y @ jnp.asarray(kernel, jnp.float32))
    return KalmanState(mean + bias, var)


def _draw(key: jax.Array, state: KalmanState, shape: tuple[int, ...]) -> jax.Array:
    """Draws y ~ N(mu, Sigma) of `shape`, channels last."""
    mean, var = for_channels(state, shape[-1])
    if mean.ndim > 1:
        raise ValueError(
            f"the Monte Carlo transition got a state of shape {mean.shape}; expected"
            " one state [C]. jax.vmap over several, or move them in closed form."
        )
    noise = jax.random.normal(key, shape, jnp.float32)
    return mean + standard_deviation(var) * noise
