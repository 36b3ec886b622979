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
    """scale x / max(sqrt(var_NHW + epsilon), v x + sqrt(var_HW + epsilon)) + bias, with
    the biased variances of the batch and of each example, per channel (Liu et al.,
    "Evolving Normalization-Activation Layers", NeurIPS 2020; constants from their code,
    tensorflow/tpu, whose decay is 0.9). It has its nonlinearity in it, so no activation
    follows. Costs one parameter per channel more than `nn.BatchNorm` (v,
    ``nonlinearity_scale``, from 1), a second variance, and that of the example also in
    inference, so it does not fold into a convolution. Use it in the place of batch norm
    and ReLU at normal batch sizes.

    Channels come last. It hands on no state. Attributes are those of `nn.BatchNorm`,
    and so are the running ``mean`` and ``var`` in ``batch_stats``: the mean is used for
    nothing but to merge the variances of several replicas.
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
    """scale x sigmoid(v x) / sqrt(var_group + epsilon) + bias, with the biased variance
    of each example's groups of channels (Liu et al., "Evolving Normalization-Activation
    Layers", NeurIPS 2020; constants from their code, tensorflow/tpu). It has its
    nonlinearity in it, so no activation follows. Costs one parameter per channel more
    than `nn.GroupNorm` (v, ``nonlinearity_scale``, from 1), stores no statistics and
    does the same in training and inference. Use it in the place of group norm and ReLU,
    at any batch size.

    Channels come last. It hands on no state. Attributes mean what they do in
    `nn.GroupNorm`. Besides:

    Attributes:
        use_running_average: accepted, so that networks can build any normaliser alike,
            and unused.
        num_groups: G, a divisor of the channel count. (Their code takes the next
            smaller divisor where it is none.)

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
