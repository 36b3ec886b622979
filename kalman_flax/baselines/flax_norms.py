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
    r"""Normalises each channel by its moments over the micro-batch, as Flax does.

    $$
    y = \gamma \, \frac{x - \mu_B}{\sqrt{\sigma_B^2 + \epsilon}} + \beta
    $$

    $\mu_B$ and $\sigma_B^2$ are the mean and variance of a channel over the
    micro-batch. In inference the moving averages of both take their place. $\gamma$ is
    ``scale``, $\beta$ is ``bias``, $\epsilon$ is `epsilon`.

    Source:
        Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
        Reducing Internal Covariate Shift" (ICML 2015). Attributes, variables and values
        are those of `nn.BatchNorm`. Two things differ. The variance takes two centred
        passes by default: Flax's default gives 0 for data at 1e4 +- 1. And moments that
        overflow do not move the running ones.

    Cost:
        - Parameters: 2 C.
        - Statistics: 2 C running ones.
        - Passes: two over the activation for the moments, as the variance is centred.
        - Inference: no pass; it folds into the convolution before it.

    When to use:
        Where the micro-batch gives good statistics, from some 16 images on. Below that
        the error grows (Wu and He, 2018).

    Variables:
        Parameters ``scale`` and ``bias``; in ``batch_stats`` the running ``mean`` and
        ``var``; all ``[C]``.

    State:
        Hands on the moments of its output: mean $\beta$ and variance $\gamma^2$.

    Attributes:
        use_fast_variance: True takes the variance in one pass, as Flax does.

    Raises:
        ValueError: an attribute outside its range; values that are complex; an empty
            micro-batch.
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
    r"""Normalises each example by the moments of its groups of channels, as Flax does.

    $$
    y = \gamma \, \frac{x - \mu_{ng}}{\sqrt{\sigma_{ng}^2 + \epsilon}} + \beta
    $$

    $\mu_{ng}$ and $\sigma_{ng}^2$ are the mean and variance of example $n$ over height,
    width and the channels of group $g$. $\gamma$ and $\beta$ are ``scale`` and
    ``bias``.

    Source:
        Wu and He, "Group Normalization" (ECCV 2018). Attributes, variables and values
        are those of `nn.GroupNorm`, here over Signals.

    Cost:
        - Parameters: 2 C.
        - Statistics: none stored.
        - Passes: two over the activation for the moments, as the variance is centred.
        - Inference: the same passes, so it does not fold into a convolution.

    When to use:
        Where the micro-batch is small, down to one image: no example depends on
        another.

    Variables:
        Parameters ``scale`` and ``bias``, ``[C]``.

    State:
        Ends. What a channel's moments over the micro-batch are is not known.

    Attributes:
        use_fast_variance: True takes the variance in one pass, as Flax does.
        use_running_average: accepted, here and in the call, so that networks can use
            any normaliser alike, and unused: statistics are those of each example, also
            in inference.

    Raises:
        ValueError: a number or size of groups that does not divide the channels; values
            that are complex.
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
    r"""Normalises each example by its moments over all channels.

    $$
    y = \gamma \, \frac{x - \mu_n}{\sqrt{\sigma_n^2 + \epsilon}} + \beta
    $$

    $\mu_n$ and $\sigma_n^2$ are the mean and variance of example $n$ over height, width
    and all channels. $\gamma$ and $\beta$ are ``scale`` and ``bias``, one each a
    channel. It is `GroupNorm` of one group.

    Source:
        Ba, Kiros and Hinton, "Layer Normalization" (2016), in the form that Wu and He
        (2018) compare with on images. `nn.LayerNorm` takes the moments of each pixel by
        itself.

    Cost:
        That of `GroupNorm`.

    When to use:
        As the simplest case of `GroupNorm`: there is no number of groups to choose. In
        recurrent networks and transformers, where it comes from, it is the rule.

    Variables:
        Parameters ``scale`` and ``bias``, ``[C]``.

    State:
        Ends, as that of `GroupNorm`.

    Attributes are those of `GroupNorm`.

    Raises:
        ValueError: as in `GroupNorm`.
    """

    num_groups: int | None = 1


class InstanceNorm(GroupNorm):
    r"""Normalises each channel of each example by its own moments.

    $$
    y = \gamma \, \frac{x - \mu_{nc}}{\sqrt{\sigma_{nc}^2 + \epsilon}} + \beta
    $$

    $\mu_{nc}$ and $\sigma_{nc}^2$ are the mean and variance of example $n$ and channel
    $c$ over height and width. $\gamma$ and $\beta$ are ``scale`` and ``bias``. It is
    `GroupNorm` of one channel per group.

    Source:
        Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient
        for Fast Stylization" (2016).

    Cost:
        That of `GroupNorm`.

    When to use:
        Where an image's contrast is to be removed, as in style transfer. A classifier
        loses with it what the strengths of the channels tell, and all of the input
        where a map is 1x1.

    Variables:
        Parameters ``scale`` and ``bias``, ``[C]``.

    State:
        Ends, as that of `GroupNorm`.

    Attributes are those of `GroupNorm`.

    Raises:
        ValueError: as in `GroupNorm`.
    """

    num_groups: int | None = None
    group_size: int | None = 1


class FrozenBatchNorm(BatchNorm):
    r"""Normalises by running statistics that never move, in training too.

    $$
    y = a x + b, \qquad
    a = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad b = \beta - a \mu
    $$

    $\mu$ and $\sigma^2$ are the running ``mean`` and ``var``. $\gamma$ and $\beta$,
    ``scale`` and ``bias``, train.

    Source:
        He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016, appendix
        A). They keep $\gamma$ and $\beta$ constant too: leave them out of the optimiser
        for that.

    Cost:
        - Parameters: 2 C.
        - Statistics: 2 C running ones, which stay as they are.
        - Passes: none for moments, in training or inference.
        - Inference: it folds into the convolution before it.

    When to use:
        To fine-tune a network pre-trained with batch norm on micro-batches too small
        for statistics, as in detection. From scratch it normalises nothing: its
        statistics stay 0 and 1.

    Variables:
        Those of `BatchNorm`.

    State:
        Hands on what it is told, moved by $a$ and $b$: exact.

    Attributes are those of `BatchNorm`, but:

    Attributes:
        use_running_average: accepted and unused, here and in the call.

    Raises:
        ValueError: an attribute outside its range; values that are complex.
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
