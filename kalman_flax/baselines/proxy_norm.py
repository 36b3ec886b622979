"""Proxy normalization: group norm whose activations are normalised by a prediction."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from kalman_flax._filter.observe import observe
from kalman_flax._filter.predict import predict_affine
from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import normalize
from kalman_flax.layers.functions import relu
from kalman_flax.layers.normalizer import Normalizer, Unfiltered
from kalman_flax.layers.signal import Signal


class ProxyNorm(Unfiltered, Normalizer):
    r"""Group norm, activation, and normalisation by what a Gaussian proxy predicts.

    $$
    y = \frac{\phi(\gamma n + \beta) - m}{\sqrt{v + \epsilon_p}}, \qquad
    n = \frac{x - \mu_{ng}}{\sqrt{\sigma_{ng}^2 + \epsilon}}
    $$

    $$
    m = \mathrm{E}[\phi(\gamma z + \beta)], \qquad
    v = \mathrm{Var}[\phi(\gamma z + \beta)], \qquad
    z \sim N\left(\tilde{\beta}, (1 + \tilde{\gamma})^2\right)
    $$

    $\mu_{ng}$ and $\sigma_{ng}^2$ are the moments of each example's groups of channels.
    $\phi$ is `activation`, $\epsilon_p$ is `proxy_epsilon`. $\gamma$ and $\beta$ are
    ``scale`` and ``bias``, $\tilde{\gamma}$ and $\tilde{\beta}$ are ``proxy_scale`` and
    ``proxy_bias``. So each channel of the activation has mean 0 and variance 1, as far
    as its $n$ is Gaussian, without a look at other examples. It has its nonlinearity in
    it, so no activation follows.

    Source:
        Labatie et al., "Proxy-Normalizing Activations to Match Batch Normalization
        while Removing Batch Dependence" (NeurIPS 2021), with group norm. Epsilon and
        initial values are from graphcore/examples. That code takes m and v from 200
        quantiles of z. Here they are the filter's own prediction through phi, in closed
        form for the ReLU. In that code the two proxy parameters decay as the weights
        do, scale and bias not.

    Cost:
        - Parameters: 4 C.
        - Statistics: none stored.
        - Passes: those of group norm, and arithmetic on ``[C]`` vectors.
        - Inference: the same as training.

    When to use:
        In the place of group norm and activation, at any micro-batch size.

    Variables:
        Parameters ``scale``, ``bias``, ``proxy_scale`` and ``proxy_bias``, ``[C]``; the
        last two start at 0.

    State:
        Ends. What a channel's moments over the micro-batch are is not known.

    Attributes mean what they do in `nn.GroupNorm`. Channels come last. Besides:

    Attributes:
        use_running_average: accepted, so that networks can build any normaliser alike,
            and unused.
        num_groups: a divisor of the channel count; 1 is their layer norm with proxy.
        proxy_epsilon: added to v, so that a channel that phi all but switches off is
            not blown up.
        activation: phi, a function of Signals, such as ``kf.activation(nn.gelu)``.

    Raises:
        ValueError: num_groups does not divide the channels; an activation that loses
            the state.
    """

    num_groups: int = 32
    proxy_epsilon: float = 0.03
    activation: Callable[[Signal], Signal] = relu

    @nn.compact
    def __call__(
        self,
        x: Signal | jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Signal | jax.Array:
        """Normalises, activates and normalises; a Signal gives a Signal.

        Args:
            x: ``[N, ..., C]``, a Signal or a plain array.
            use_running_average: as the attribute.
            mask: broadcastable to `x`; values where it is false do not count.
        """
        value, mask = self._masked(x, mask)
        shape, zeros = value.shape[-1:], nn.initializers.zeros
        scale, bias = self._affine(value.shape[-1])
        proxy_scale = self.param("proxy_scale", zeros, shape, self.param_dtype)
        proxy_bias = self.param("proxy_bias", zeros, shape, self.param_dtype)

        groups = observe(value, "group", num_groups=self.num_groups, mask=mask)
        u = normalize(value, groups, scale, bias, epsilon=self.epsilon)
        proxy = KalmanState(proxy_bias, jnp.square(1.0 + proxy_scale))
        activated = self.activation(Signal(u, predict_affine(proxy, scale, bias)))
        if activated.state is None:
            raise ValueError(
                f"activation is {self.activation}, which loses the state; wrap it:"
                " kf.activation(fn)."
            )
        y = normalize(activated.value, activated.state, epsilon=self.proxy_epsilon)
        return self._output(x, y, scale, bias, proxy_scale, proxy_bias)
