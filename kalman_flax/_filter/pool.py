"""Averages over neighbouring positions: pooling and resizing, closed form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kalman_flax._filter.geometry import Padding, PerAxis, positions, slide
from kalman_flax._filter.state import KalmanState


def predict_average(
    state: KalmanState,
    weight: np.ndarray | float = 1.0,
    share: np.ndarray | float = 1.0,
) -> KalmanState:
    """Moves a state through weighted sums of neighbouring positions.

    Neighbours are taken as fully correlated, as in the released code: a sum with the
    weights w_i is x sum_i w_i. An average, whose weights sum to 1 everywhere, then
    leaves the state as it is: bilinear resizing, or pooling without padding. (Taken as
    independent, four neighbours would divide the variance by four. In the maps of
    networks they are much alike.)

    Args:
        state: ``[..., C]``.
        weight: the sums of the weights, by kind of position: ``[kinds]``, or one.
        share: of the positions of each kind; sums to 1.

    Returns:
        The moments over all positions: mean r mu, variance E[r^2] v + Var[r] mu^2, with
        r = `weight`.
    """
    weight = np.asarray(weight)
    if np.all(weight == 1.0):
        return state
    mean_weight = float(np.sum(share * weight))
    spread = float(np.sum(share * np.square(weight - mean_weight)))
    mean, var = state
    return KalmanState(
        mean_weight * mean, (mean_weight**2 + spread) * var + spread * mean**2
    )


def predict_avg_pool(
    state: KalmanState,
    window_shape: Sequence[int],
    input_size: Sequence[int],
    *,
    strides: PerAxis = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> KalmanState:
    """Moves a state through an average over windows, see `predict_average`.

    Args:
        state: ``[..., C]``.
        window_shape: positions of a window along each axis.
        input_size: positions of the map along each axis.
        strides, padding, count_include_pad: as in `flax.linen.avg_pool`. Zeros that
            count make the average at the border smaller.

    Raises:
        ValueError: see `slide`.
    """
    axes = slide(window_shape, input_size, strides=strides, padding=padding)
    inside, share = positions(axes)
    weight = inside.mean(axis=1) if count_include_pad else 1.0
    return predict_average(state, weight, share)
