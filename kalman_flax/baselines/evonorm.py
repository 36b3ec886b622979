"""EvoNorms: normalisation and nonlinearity found together by evolution."""

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


class _EvoNorm(Unfiltered, nn.Module):
    """What both share: the parameters, the affine map, the contract of Signals."""

    use_running_average: bool | None = None
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()

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
        value = as_signal(x).value
        shape = value.shape[-1:]

        def parameter(name: str, init: nn.initializers.Initializer) -> jax.Array:
            return self.param(name, init, shape, self.param_dtype)

        v = parameter("nonlinearity_scale", nn.initializers.ones)
        scale = parameter("scale", self.scale_init) if self.use_scale else None
        bias = parameter("bias", self.bias_init) if self.use_bias else None
        wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        y = self._activate(wide, v, use_running_average, mask)
        y = y if scale is None else y * scale
        y = y if bias is None else y + bias
        dtype = nn.dtypes.canonicalize_dtype(value, v, scale, bias, dtype=self.dtype)
        y = y.astype(dtype)
        return Signal(y) if isinstance(x, Signal) else y

    def _activate(
        self,
        x: jax.Array,
        v: jax.Array,
        use_running_average: bool | None,
        mask: jax.Array | None,
    ) -> jax.Array:
        raise NotImplementedError


class EvoNormB0(_EvoNorm):
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
    axis_name: str | None = None

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
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        batch = KalmanState(mean.value, var.value)
        if not use_running_average:
            axis_name = None if self.is_initializing() else self.axis_name
            batch = observe(x, mask=mask, axis_name=axis_name)
            if not self.is_initializing():
                kept = self.momentum
                mean.value = kept * mean.value + (1 - kept) * batch.mean
                var.value = kept * var.value + (1 - kept) * batch.var
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

    Channels come last. It hands on no state. Attributes are those of `nn.GroupNorm`.
    Besides:

    Attributes:
        use_running_average: accepted, so that networks can build any normaliser alike,
            and unused.
        num_groups: G, a divisor of the channel count. (Their code takes the next
            smaller divisor where it is none.)

    Raises:
        ValueError: a number of groups below 1, or that does not divide the channels.
    """

    num_groups: int = 32

    def __post_init__(self):
        if self.num_groups < 1:
            raise ValueError(
                f"num_groups is {self.num_groups}; expected a divisor of the channels."
            )
        super().__post_init__()

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
