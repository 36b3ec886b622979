"""Filter response normalisation with its thresholded linear unit."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kalman_flax._filter.observe import observe
from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import normalize
from kalman_flax.baselines.flax_norms import Unfiltered
from kalman_flax.layers.normalizer import Normalizer
from kalman_flax.layers.signal import Signal, as_signal


class FilterResponseNorm(Unfiltered, Normalizer):
    """max(scale x / sqrt(nu2 + epsilon) + bias, threshold), where nu2 is the mean of
    x^2 over the map of each example and channel (Singh and Krishnan, "Filter Response
    Normalization Layer", CVPR 2020). It has its nonlinearity, TLU, in it, so no
    activation follows. Costs one parameter per channel more than `nn.BatchNorm`
    (``threshold``, from 0), stores no statistics and does the same in training and
    inference. Use it where nothing may depend on the batch; maps should be larger than
    1x1, and as it does not centre, the rate of learning may have to be warmed up.

    Channels come last. It hands on no state: the second moment of its output is known,
    the mean is not. Attributes are those of `nn.BatchNorm` without running statistics.
    Besides:

    Attributes:
        use_running_average: accepted, so that networks can build any normaliser alike,
            and unused.
        epsilon: added to nu2, above 0.
        learn_epsilon: adds to `epsilon` the absolute value of a learned scalar, the
            parameter ``epsilon``, from 1e-4. For networks with maps of 1x1, where a
            tiny epsilon leaves of x no more than its sign.

    Raises:
        ValueError: an epsilon that is not above 0.
    """

    epsilon: float = 1e-6
    learn_epsilon: bool = False

    def __post_init__(self):
        if not self.epsilon > 0.0:
            raise ValueError(
                f"epsilon is {self.epsilon}; expected a number above 0, without which"
                " a map of zeros gives NaN."
            )
        super().__post_init__()

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
        value = as_signal(x).value
        shape, zeros = value.shape[-1:], nn.initializers.zeros
        scale, bias = self._affine(value.shape[-1])
        threshold = self.param("threshold", zeros, shape, self.param_dtype)
        epsilon = self.epsilon
        if self.learn_epsilon:
            init = nn.initializers.constant(1e-4)
            epsilon += jnp.abs(self.param("epsilon", init, (), jnp.float32))
        mean, var = observe(value, "instance", mask=mask)
        square = KalmanState(0.0, jnp.square(mean) + var)
        y = normalize(value, square, scale, bias, epsilon=epsilon)
        return self._output(x, jnp.maximum(y, threshold), scale, bias, threshold)
