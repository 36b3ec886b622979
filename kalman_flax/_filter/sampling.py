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
from typing import Any

import jax
import jax.numpy as jnp

from kalman_flax._filter.convolution import convolve
from kalman_flax._filter.observe import observe
from kalman_flax._filter.state import KalmanState, for_channels, standard_deviation


def sample_conv(
    key: jax.Array,
    state: KalmanState,
    kernel: jax.Array,
    input_size: Sequence[int],
    *,
    num_maps: int = 1,
    bias: jax.Array | float = 0.0,
    **geometry: Any,
) -> KalmanState:
    """Moves a state through a 2-D convolution by sampling maps.

    Args:
        key: PRNG key.
        state: ``[C]``.
        kernel: ``[h, w, C / groups, D]``.
        input_size: height and width of the maps drawn.
        num_maps: maps drawn; the paper draws one.
        bias: ``[D]``.
        **geometry: strides, padding, kernel_dilation, feature_group_count, as in
            `kalman_flax.predict_conv`.

    Returns:
        ``[D]``, the moments of the sampled output over maps and positions.
    """
    channels = kernel.shape[2] * geometry.get("feature_group_count", 1)
    y = _draw(key, state, (num_maps, *input_size, channels))
    mean, var = observe(convolve(y, jnp.asarray(kernel, jnp.float32), **geometry))
    return KalmanState(mean + bias, var)


def sample_dense(
    key: jax.Array,
    state: KalmanState,
    kernel: jax.Array,
    bias: jax.Array | float = 0.0,
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
