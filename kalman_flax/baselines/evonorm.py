"""EvoNorms: normalisation and nonlinearity found together by evolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kalman_flax._filter.observe import observe
from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import normalize
from kalman_flax.layers.normalizer import Normalizer, Running, Unfiltered
from kalman_flax.layers.signal import Signal


class _EvoNorm(Unfiltered, Normalizer):
    """What both share: the parameters, the affine map, the contract of Signals."""

    @nn.compact
    def __call__(
        self,
        x: Signal | jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Signal | jax.Array:
        """Normalises and activates.

        Args:
            x: ``[N, ..., C]``, a Signal or a plain array.
            use_running_average: as the attribute.
            mask: broadcastable to `x`; values where it is false do not count.

        Returns:
            A Signal of unknown state for a Signal, an array for an array.
        """
        value, mask = self._masked(x, mask)
        shape, ones = value.shape[-1:], nn.initializers.ones
        v = self.param("nonlinearity_scale", ones, shape, self.param_dtype)
        scale, bias = self._affine(value.shape[-1])
        wide = value.astype(jnp.result_type(value, jnp.float32))
        y = self._activate(wide, v, use_running_average, mask) * scale + bias
        return self._output(x, y, v, scale, bias)

    def _activate(
        self,
        x: jax.Array,
        v: jax.Array,
        use_running_average: bool | None,
        mask: jax.Array | None,
    ) -> jax.Array:
        raise NotImplementedError


class EvoNormB0(Running, _EvoNorm):
    r"""Normalises by batch and example and activates; found by evolution.

    $$
    y = \gamma \, \frac{x}{\max\left(\sqrt{s_{NHW}^2 + \epsilon},\;
    v x + \sqrt{s_{HW}^2 + \epsilon}\right)} + \beta
    $$

    $s_{NHW}^2$ and $s_{HW}^2$ are the biased variances of a channel over the batch and
    over each example. In inference the running variance takes the place of the first.
    $\gamma$ and $\beta$ are ``scale`` and ``bias``, $v$ is ``nonlinearity_scale``. It
    has its nonlinearity in it, so no activation follows.

    Source:
        Liu et al., "Evolving Normalization-Activation Layers" (NeurIPS 2020). Constants
        are from their code, tensorflow/tpu, whose decay is 0.9.

    Cost:
        - Parameters: 3 C, one per channel more than `nn.BatchNorm`.
        - Statistics: 2 C running ones.
        - Passes: those of batch norm, and a second variance, that of each example.
        - Inference: the variance of the example too, so it does not fold into a
          convolution.

    When to use:
        In the place of batch norm and ReLU at normal batch sizes.

    Variables:
        Parameters ``scale``, ``bias`` and ``nonlinearity_scale``, which starts at 1; in
        ``batch_stats`` the running ``mean`` and ``var``, as in `nn.BatchNorm`; all
        ``[C]``. The mean is used for nothing but to merge the variances of several
        replicas.

    State:
        Ends.

    Attributes are those of `nn.BatchNorm`. Channels come last.

    Raises:
        ValueError: an attribute outside its range; values that are complex; an empty
            micro-batch.
    """

    momentum: float = 0.99
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None

    def _activate(
        self,
        x: jax.Array,
        v: jax.Array,
        use_running_average: bool | None,
        mask: jax.Array | None,
    ) -> jax.Array:
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        batch = running = self._running(x)
        if not use_running_average:
            batch = self._observe(x, mask=mask)
            self._move_running(running, batch)
        instance = observe(x, "instance", mask=mask)
        of_batch = jnp.sqrt(batch.var + self.epsilon)
        of_example = jnp.sqrt(instance.var + self.epsilon)
        of_example = jnp.expand_dims(of_example, range(1, x.ndim - 1))
        return x / jnp.maximum(of_batch, v * x + of_example)


class EvoNormS0(_EvoNorm):
    r"""Normalises each example's groups and activates; found by evolution.

    $$
    y = \gamma \, \frac{x \, \mathrm{sigmoid}(v x)}{\sqrt{s_{ng}^2 + \epsilon}} + \beta
    $$

    $s_{ng}^2$ is the biased variance of group $g$ of the channels of example $n$.
    $\gamma$ and $\beta$ are ``scale`` and ``bias``, $v$ is ``nonlinearity_scale``. It
    has its nonlinearity in it, so no activation follows.

    Source:
        Liu et al., "Evolving Normalization-Activation Layers" (NeurIPS 2020). Constants
        are from their code, tensorflow/tpu. That code takes the next smaller divisor
        where `num_groups` is none; here it is an error.

    Cost:
        - Parameters: 3 C, one per channel more than `nn.GroupNorm`.
        - Statistics: none stored.
        - Passes: those of group norm.
        - Inference: the same as training.

    When to use:
        In the place of group norm and ReLU, at any batch size.

    Variables:
        Parameters ``scale``, ``bias`` and ``nonlinearity_scale``, which starts at 1;
        all ``[C]``.

    State:
        Ends.

    Attributes mean what they do in `nn.GroupNorm`. Channels come last. Besides:

    Attributes:
        use_running_average: accepted, so that networks can build any normaliser alike,
            and unused.
        num_groups: G, a divisor of the channel count.

    Raises:
        ValueError: a number of groups below 1, or that does not divide the channels.
    """

    num_groups: int = 32

    def _activate(
        self,
        x: jax.Array,
        v: jax.Array,
        use_running_average: bool | None,
        mask: jax.Array | None,
    ) -> jax.Array:
        var = observe(x, "group", num_groups=self.num_groups, mask=mask).var
        x = x * jax.nn.sigmoid(v * x)
        return normalize(x, KalmanState(0.0, var), epsilon=self.epsilon)
