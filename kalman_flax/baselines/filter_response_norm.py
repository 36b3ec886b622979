"""Filter response normalisation with its thresholded linear unit."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kalman_flax._filter.mixture import second_moment
from kalman_flax._filter.observe import observe
from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import normalize
from kalman_flax.layers.normalizer import Normalizer, Unfiltered
from kalman_flax.layers.signal import Signal


class FilterResponseNorm(Unfiltered, Normalizer):
    r"""Divides each channel of each example by its root mean square, then thresholds.

    $$
    y = \max\left(\gamma \, \frac{x}{\sqrt{\nu^2 + \epsilon}} + \beta,\; \tau\right)
    $$

    $\nu^2$ is the mean of $x^2$ over the map of each example and channel. $\gamma$ and
    $\beta$ are ``scale`` and ``bias``, $\tau$ is ``threshold``. The maximum is its
    nonlinearity, TLU, so no activation follows.

    Source:
        Singh and Krishnan, "Filter Response Normalization Layer" (CVPR 2020).

    Cost:
        - Parameters: 3 C, one per channel more than `nn.BatchNorm`.
        - Statistics: none stored.
        - Passes: over the activation for the moments.
        - Inference: the same as training.

    When to use:
        Where nothing may depend on the batch. Maps should be larger than 1x1. As it
        does not centre, the rate of learning may have to be warmed up.

    Variables:
        Parameters ``scale``, ``bias`` and ``threshold``, which starts at 0; all
        ``[C]``.

    State:
        Ends. The second moment of its output is known, the mean is not.

    Attributes are those of `nn.BatchNorm` without running statistics. Channels come
    last.
    Besides:

    Attributes:
        use_running_average: accepted, so that networks can build any normaliser alike,
            and unused.
        epsilon: added to nu2, above 0.

    Raises:
        ValueError: an epsilon that is not above 0.
    """

    epsilon: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        if self.epsilon == 0.0:
            raise ValueError(
                "epsilon is 0; expected a number above 0, without which a map of zeros"
                " gives NaN."
            )

    @nn.compact
    def __call__(
        self,
        x: Signal | jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Signal | jax.Array:
        """Normalises and thresholds.

        Args:
            x: ``[N, ..., C]``, a Signal or a plain array.
            use_running_average: unused.
            mask: broadcastable to `x`; values where it is false do not count.

        Returns:
            A Signal of unknown state for a Signal, an array for an array.
        """
        value, mask = self._masked(x, mask)
        shape, zeros = value.shape[-1:], nn.initializers.zeros
        scale, bias = self._affine(value.shape[-1])
        threshold = self.param("threshold", zeros, shape, self.param_dtype)
        square = second_moment(observe(value, "instance", mask=mask), 0.0)
        state = KalmanState(0.0, square)
        y = normalize(value, state, scale, bias, epsilon=self.epsilon)
        return self._output(x, jnp.maximum(y, threshold), scale, bias, threshold)
