"""Flax's own normalisers under the Signal contract."""

from __future__ import annotations

import flax.linen as nn
import jax

from kalman_flax.layers.signal import Signal, as_signal
from kalman_flax.state import KalmanState, for_channels


class Unfiltered:
    """Mixin for normalisers that use no prediction: their first step does nothing.

    With it a network that calls `filter` and `normalize` apart serves them all.
    """

    def filter(self, x: Signal | jax.Array) -> Signal:
        """Returns `x` as it is."""
        return as_signal(x)

    def normalize(self, x: Signal) -> Signal:
        """Observes and normalises, all in the second step."""
        return self(x)


class BatchNorm(Unfiltered, nn.BatchNorm):
    """`nn.BatchNorm` over Signals (Ioffe and Szegedy, 2015): attributes, variables and
    values are Flax's. It hands on the moments of its output, bias and scale^2.

    The variance takes two centred passes: Flax's default is 0 for data at 1e4 +- 1.
    """

    use_fast_variance: bool = False

    def __call__(
        self,
        x: Signal | jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Signal | jax.Array:
        """As `nn.BatchNorm.__call__`; a Signal gives a Signal."""
        value = super().__call__(as_signal(x).value, use_running_average, mask=mask)
        if not isinstance(x, Signal):
            return value
        bias = self.get_variable("params", "bias", 0.0)
        scale = self.get_variable("params", "scale", 1.0)
        channels = value.shape[self.axis]
        return Signal(value, for_channels(KalmanState(bias, scale**2), channels))


class GroupNorm(Unfiltered, nn.GroupNorm):
    """`nn.GroupNorm` over Signals (Wu and He, 2018): attributes, variables and values
    are Flax's. What a channel's moments over the micro-batch are after it is not known,
    so the state ends.

    Attributes:
        use_running_average: accepted, so that networks can build any normaliser alike,
            and unused: statistics are those of each example, also in inference.
    """

    use_fast_variance: bool = False
    use_running_average: bool | None = None

    def __call__(
        self, x: Signal | jax.Array, *, mask: jax.Array | None = None
    ) -> Signal | jax.Array:
        """As `nn.GroupNorm.__call__`; a Signal gives a Signal."""
        value = super().__call__(as_signal(x).value, mask=mask)
        return Signal(value) if isinstance(x, Signal) else value
