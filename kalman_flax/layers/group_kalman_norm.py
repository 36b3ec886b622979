"""Group Kalman Normalization: the filter on the statistics of each example's groups."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from kalman_flax._filter.observe import observe
from kalman_flax._filter.predict import predict_affine, predict_group
from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import Rule, choose, is_known, normalize
from kalman_flax.layers.kalman_norm import (
    FilterParameters,
    LearnGain,
    Noise,
    Parameters,
    Propagate,
)
from kalman_flax.layers.normalizer import Filtered, filtered_moments
from kalman_flax.layers.remat import keep
from kalman_flax.layers.signal import Signal, as_signal, state_of


class GroupKalmanNorm(FilterParameters, nn.Module):
    r"""Normalises each example's groups by the Kalman estimate of their moments.

    $$
    \hat{\mu}_c = p \, \mu_{\mathrm{pred}} + q \, \bar{x}_{nc}, \qquad
    \hat{\Sigma}_c = p \, (\Sigma_{\mathrm{pred}} + R) + q \, S_{nc}
    + p \, q \, (\bar{x}_{nc} - \mu_{\mathrm{pred}})^2
    $$

    $$
    y = \gamma \, \frac{x - \hat{\mu}_g}{\sqrt{\hat{\Sigma}_g + \epsilon}} + \beta
    $$

    $\bar{x}_{nc}$ and $S_{nc}$ are the moments of channel $c$ of example $n$.
    $\hat{\mu}_g$ and $\hat{\Sigma}_g$ are those of the group, from its channels
    (`predict_group`). $q$ is the gain, $p = 1 - q$, $R$ the process noise. $\gamma$ and
    $\beta$ are ``scale`` and ``bias``. The formula is that of the rule "mixture".

    That is the update of the group itself, by either rule of `update`, by what was
    predicted and observed of it. In addition it tells what each channel is after
    normalisation.

    On a plain array, a Signal of unknown state, or with gain 1 it is `nn.GroupNorm`,
    and hands on the moments of its output as they are. A max-pool before the first of
    these layers observes the whole micro-batch: start with a norm.

    Source:
        GKN of Wang et al., "Kalman Normalization" (NeurIPS 2018): Eq. 6 and 7 on the
        sets of Eq. 8. The paper's equations carry the moments of the group for every
        channel in it: ``propagate="raw"``.

    Cost:
        - Parameters: one scalar more than `nn.GroupNorm`, the gain; with `noise` C
          more.
        - Statistics: none stored.
        - Passes: those of group norm. A state ``[N, C]`` moves through the network,
          which costs about 1 / (H W) of its convolutions.
        - Inference: the same as training, with the statistics of the example.

    When to use:
        Where group norm would be used and the state is known.

    Variables:
        Parameters ``scale`` and ``bias``, ``[C]``, as in `nn.GroupNorm`, and ``gain``;
        with `noise` a parameter ``noise``, ``[C]``.

    State:
        Hands on the moments of each channel of its output. The group as a whole has
        mean 0 and variance 1, but a channel in it has mean $\gamma (\hat{\mu}_c -
        \hat{\mu}_g) / \hat{\sigma}_g + \beta$ and variance $(\gamma \hat{\sigma}_c /
        \hat{\sigma}_g)^2$, with $\hat{\sigma}^2 = \hat{\Sigma}$.

    Attributes mean what they do in `nn.GroupNorm`. Besides:

    Attributes:
        use_running_average: accepted, so that networks can build any normaliser alike,
            and unused.
        axis: of the channels.
        gain: q, as in `KalmanNorm`.
        learn_gain: as in `KalmanNorm`.
        noise: R, as in `KalmanNorm`.
        rule: ``"mixture"`` or ``"paper"`` (Eq. 7), of the group, see `update`.
        propagate: ``"normalized"``: the moments of the output; or ``"raw"``: the
            filtered moments of the input, those of the group for every channel.

    Raises:
        ValueError: an option that `KalmanNorm` refuses; a number of groups below 1, or
            that does not divide the channels; a state of another shape than ``[C]`` or
            ``[N, C]``.
    """

    num_groups: int = 32
    use_running_average: bool | None = None
    axis: int = -1
    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()
    gain: float = 0.1
    learn_gain: LearnGain | None = "scalar"
    noise: Noise | None = None
    rule: Rule = "mixture"
    propagate: Propagate = "normalized"

    def __call__(
        self,
        x: Signal | jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Signal | jax.Array:
        """Filters and normalises.

        Args:
            x: ``[N, ..., C]``, a Signal or a plain array.
            use_running_average: unused.
            mask: broadcastable to `x`, the same for all channels; values where it is
                false do not count.

        Returns:
            What came in, normalised: a Signal for a Signal, an array for an array.
        """
        y = self.normalize(self.filter(x, mask=mask))
        return y if isinstance(x, Signal) else y.value

    def filter(
        self, x: Signal | jax.Array, *, mask: jax.Array | None = None
    ) -> Filtered:
        """The first step: returns the value with its filtered moments, ``[N, C]``."""
        valid, (value, mask) = as_signal(x).valid, self._masked(x, mask)
        parameters = self._variables(value.shape[self.axis])
        observed = observe(value, "instance", axis=self.axis, mask=mask)
        predicted = self._predicted(Signal(value, as_signal(x).state), observed)
        if predicted is None or self.gain == 1.0:
            return Filtered(value, keep(observed), valid)
        filtered = self._filtered(predicted, observed, parameters)
        return Filtered(value, keep(filtered), valid)

    def normalize(self, x: Filtered) -> Signal:
        """The second step: normalises what `filter` returned by its groups.

        Raises:
            ValueError: something else than `filter` returns.
        """
        moments = filtered_moments(self, x)
        *_, scale, bias = self._variables(x.value.shape[self.axis])
        state = group = predict_group(moments, self.num_groups)
        y = normalize(x.value, group, scale, bias, epsilon=self.epsilon, axis=self.axis)
        if self.propagate == "normalized":
            slope = scale * lax.rsqrt(group.var + self.epsilon)
            centred = KalmanState(moments.mean - group.mean, moments.var)
            state = predict_affine(centred, slope, bias)
        return Signal(self._cast(x.value, y, scale, bias), state, x.valid)

    def _predicted(self, x: Signal, observed: KalmanState) -> KalmanState | None:
        """What is known of `x`, ``[C]`` or ``[N, C]``, before it is observed."""
        state, shape = state_of(x, self.axis), jnp.shape(observed.mean)
        if state is None or {*map(jnp.shape, state)} <= {shape, shape[-1:]}:
            return state
        raise ValueError(
            f"GroupKalmanNorm got a state of shape {jnp.shape(state.mean)}; expected"
            f" {shape[-1:]}, or {shape}, one of each example. jax.vmap over several"
            " micro-batches."
        )

    def _filtered(
        self, predicted: KalmanState, observed: KalmanState, parameters: Parameters
    ) -> KalmanState:
        """Moments of each channel, whose group has those of `update` by the rule."""
        filtered = self._combine(predicted, observed, parameters, self.rule)
        if self.rule == "mixture":
            return filtered
        # p mu_pred + q x_bar varies over the group by less than p and q times what they
        # do: by p q times the variance of x_bar - mu_pred, of which each channel gets
        # its share.
        known = choose(is_known(predicted), predicted, observed)
        apart = observed.mean - known.mean
        spread = predict_group(
            KalmanState(apart, jnp.zeros_like(apart)), self.num_groups
        )
        q = parameters.gain
        return filtered._replace(var=filtered.var + q * (1.0 - q) * spread.var)

    @nn.compact
    def _variables(self, channels: int) -> Parameters:
        return self._parameters(channels)
