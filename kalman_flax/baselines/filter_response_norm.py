"""Filter response normalisation with its thresholded linear unit."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kalman_flax.baselines.flax_norms import Unfiltered
from kalman_flax.layers.signal import Signal, as_signal
from kalman_flax.observe import observe
from kalman_flax.state import KalmanState
from kalman_flax.update import normalize


class FilterResponseNorm(Unfiltered, nn.Module):
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

    use_running_average: bool | None = None
    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()
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
        shape = value.shape[-1:]

        def parameter(name: str, init: nn.initializers.Initializer) -> jax.Array:
            return self.param(name, init, shape, self.param_dtype)

        scale = parameter("scale", self.scale_init) if self.use_scale else None
        bias = parameter("bias", self.bias_init) if self.use_bias else None
        threshold = parameter("threshold", nn.initializers.zeros)
        epsilon = self.epsilon
        if self.learn_epsilon:
            init = nn.initializers.constant(1e-4)
            epsilon += jnp.abs(self.param("epsilon", init, (), jnp.float32))
        mean, var = observe(value, "instance", mask=mask)
        y = normalize(
            value,
            KalmanState(0.0, jnp.square(mean) + var),
            1.0 if scale is None else scale,
            0.0 if bias is None else bias,
            epsilon=epsilon,
        )
        dtype = nn.dtypes.canonicalize_dtype(
            value, scale, bias, threshold, dtype=self.dtype
        )
        y = jnp.maximum(y, threshold).astype(dtype)
        return Signal(y) if isinstance(x, Signal) else y
