"""Flax's own normalisers under the Signal contract."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from kalman_flax._filter.predict import predict_affine
from kalman_flax._filter.state import KalmanState, for_channels
from kalman_flax._filter.update import normalized_state
from kalman_flax.layers.checks import Checked
from kalman_flax.layers.normalizer import Unfiltered, finite_or_old
from kalman_flax.layers.signal import Signal, as_signal, state_of
from kalman_flax.layers.valid import somewhere


class BatchNorm(Unfiltered, nn.BatchNorm):
    """y = scale (x - mean) / sqrt(var + epsilon) + bias, mean and variance of each
    channel over the micro-batch, in inference their moving averages; Ioffe and Szegedy,
    "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift" (ICML 2015). Two parameters and two running statistics per channel,
    one pass over the activation for the moments, and none in inference, where it folds
    into the convolution. Use it where the micro-batch gives good statistics, from some
    16 images on; below that error grows (Wu and He, 2018).

    `nn.BatchNorm` over Signals: attributes, variables and values are Flax's. It hands
    on the moments of its output, bias and scale^2. The variance takes two centred
    passes: Flax's default is 0 for data at 1e4 +- 1. Moments that overflow do not move
    the running ones.
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
        value, mask = _masked(self, x, mask)
        initialised = self.has_variable("batch_stats", "mean")
        old = self._moments() if initialised else None
        if not (self.use_running_average or use_running_average):
            self._check_batch(value)
        value = super().__call__(value, use_running_average, mask=mask)
        if old and self.is_mutable_collection("batch_stats"):
            for name, stat in finite_or_old(self._moments(), old)._asdict().items():
                self.put_variable("batch_stats", name, stat)
        if not isinstance(x, Signal):
            return value
        bias = self.get_variable("params", "bias", 0.0)
        scale = self.get_variable("params", "scale", 1.0)
        channels = value.shape[self.axis]
        state = for_channels(normalized_state(scale, bias), channels)
        return Signal(value, state, x.valid)

    def _moments(self) -> KalmanState:
        """The running moments, as they are."""
        mean, var = (self.get_variable("batch_stats", name) for name in ("mean", "var"))
        return KalmanState(mean, var)


class GroupNorm(Unfiltered, nn.GroupNorm):
    """y = scale (x - mean) / sqrt(var + epsilon) + bias, mean and variance of each
    example over height, width and the channels of a group; Wu and He, "Group
    Normalization" (ECCV 2018). Two parameters per channel and no running statistics;
    the pass over the activation for the moments is there in inference too, so it does
    not fold into the convolution. Use it where the micro-batch is small, down to one
    image: no example depends on another.

    `nn.GroupNorm` over Signals: attributes, variables and values are Flax's. What a
    channel's moments over the micro-batch are after it is not known, so the state ends.

    Attributes:
        use_running_average: accepted, here and in the call, so that networks can use
            any normaliser alike, and unused: statistics are those of each example, also
            in inference.
    """

    use_fast_variance: bool = False
    use_running_average: bool | None = None

    def __call__(
        self,
        x: Signal | jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Signal | jax.Array:
        """As `nn.GroupNorm.__call__`; a Signal gives a Signal."""
        value, mask = _masked(self, x, mask, first=1)
        value = super().__call__(value, mask=mask)
        return Signal(value, valid=x.valid) if isinstance(x, Signal) else value


class LayerNorm(GroupNorm):
    """`GroupNorm` of one group: mean and variance of each example over height, width
    and all channels, scale and bias per channel; Ba, Kiros and Hinton, "Layer
    Normalization" (2016), as Wu and He (2018) compare with on images (`nn.LayerNorm`
    takes the moments of each pixel by itself). It costs what `GroupNorm` does. Use it
    as that one's simplest case, without a number of groups to choose; in recurrent
    networks and transformers, where it comes from, it is the rule.
    """

    num_groups: int | None = 1


class InstanceNorm(GroupNorm):
    """`GroupNorm` of one channel per group: mean and variance of each example and
    channel over height and width; Ulyanov, Vedaldi and Lempitsky, "Instance
    Normalization: The Missing Ingredient for Fast Stylization" (2016). It costs what
    `GroupNorm` does. Use it where an image's contrast is to be removed, as in style
    transfer; a classifier loses with it what the strengths of the channels tell, and
    all of the input where a map is 1x1.
    """

    num_groups: int | None = None
    group_size: int | None = 1


class FrozenBatchNorm(BatchNorm):
    """`BatchNorm` that in training too normalises by its running statistics, and never
    moves them: y = a x + b per channel with a = scale / sqrt(var + epsilon) and b =
    bias - a mean, of which scale and bias train; He et al., "Deep Residual Learning for
    Image Recognition" (CVPR 2016, appendix A), who keep these constant too (leave them
    out of the optimiser for that). Variables are those of `BatchNorm`; it costs no pass
    for moments, in training or inference. Use it to fine-tune a network
    pre-trained with batch norm on micro-batches too small for statistics, as in
    detection; from scratch it normalises nothing, as its statistics stay 0 and 1.

    It hands on what it is told, moved by a and b: exact.

    Attributes:
        use_running_average: accepted and unused, here and in the call.
    """

    def __post_init__(self):
        # Whatever the network asks for; `nn.BatchNorm` then updates nothing.
        self.use_running_average = True
        super().__post_init__()

    def __call__(
        self,
        x: Signal | jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Signal | jax.Array:
        """Normalises by the running statistics; a Signal gives a Signal."""
        y = super().__call__(x, mask=mask)
        state = state_of(x, self.axis) if isinstance(x, Signal) else None
        if state is None:
            return as_signal(y).replace(state=None) if isinstance(x, Signal) else y
        mean, var = self._moments()
        slope = lax.rsqrt(var + self.epsilon)
        slope *= self.get_variable("params", "scale", 1.0)
        offset = self.get_variable("params", "bias", 0.0) - slope * mean
        return as_signal(y).replace(state=predict_affine(state, slope, offset))


def _masked(
    norm: Checked, x: Signal | jax.Array, mask: jax.Array | None, first: int = 0
) -> tuple[jax.Array, jax.Array | None]:
    """`Checked._masked`, for Flax: a mask of the value's shape, as `nn.GroupNorm` takes
    no other; and where nothing counts over the axes from `first` on, which is NaN to
    Flax, all of it does."""
    value, mask = norm._masked(x, mask)
    if mask is not None:
        mask = jnp.broadcast_to(mask, value.shape)
        mask = somewhere(mask, tuple(range(first, value.ndim)))
    return value, mask
