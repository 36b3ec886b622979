"""What normalisers share: scale and bias, the way out, and running moments."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kalman_flax._filter.observe import observe
from kalman_flax._filter.state import KalmanState
from kalman_flax.layers.signal import Signal, as_signal


class Affine:
    """Mixin: the scale and bias of a normaliser, and how its output leaves it."""

    def _affine(self, channels: int) -> tuple[jax.Array | float, jax.Array | float]:
        """The parameters ``scale`` and ``bias``; 1 and 0 where they are not used."""
        scale, bias = 1.0, 0.0
        if self.use_scale:
            scale = self.param("scale", self.scale_init, (channels,), self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (channels,), self.param_dtype)
        return scale, bias

    def _output(
        self,
        x: Signal | jax.Array,
        y: jax.Array,
        *parameters: jax.Array | float,
        state: KalmanState | None = None,
    ) -> Signal | jax.Array:
        """`y` in the dtype that `nn.BatchNorm` gives for the input `x` and these
        parameters; for a Signal a Signal, with `state`."""
        value = as_signal(x).value
        dtype = nn.dtypes.canonicalize_dtype(value, *parameters, dtype=self.dtype)
        y = y.astype(dtype)
        return Signal(y, state) if isinstance(x, Signal) else y


class Running:
    """Mixin: the running ``mean`` and ``var`` of `nn.BatchNorm`."""

    def _running(self, channels: int) -> KalmanState:
        """The running moments, as they are before this step."""
        shape = (channels,)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        return KalmanState(mean.value, var.value)

    def _observe(
        self,
        value: jax.Array,
        *,
        axis: int = -1,
        mask: jax.Array | None = None,
        guess: jax.Array | None = None,
    ) -> KalmanState:
        """The moments of the micro-batch, shared over `axis_name`, see `observe`."""
        axis_name = None if self.is_initializing() else self.axis_name
        return observe(value, axis=axis, mask=mask, axis_name=axis_name, guess=guess)

    def _move_running(self, running: KalmanState, state: KalmanState) -> None:
        """Moves the `running` moments towards `state`, but not in initialisation."""
        if self.is_initializing():
            return
        kept = self.momentum
        for name, old, new in zip(KalmanState._fields, running, state):
            self.put_variable("batch_stats", name, kept * old + (1 - kept) * new)


class Normalizer(Affine, nn.Module):
    """Base of normalisers with these attributes of `nn.BatchNorm`."""

    use_running_average: bool | None = None
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()


class RunningNormalizer(Running, Affine, nn.Module):
    """Base of normalisers with the attributes of `nn.BatchNorm`, in its order, up to
    `axis_name`."""

    use_running_average: bool | None = None
    axis: int = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    scale_init: nn.initializers.Initializer = nn.initializers.ones_init()
    axis_name: str | None = None


def gradient_stat(
    module: nn.Module, name: str, shape: tuple[int, ...], like: jax.Array
) -> jax.Array:
    """A variable in ``gradient_stats``, zeros where the collection was not passed.

    Its gradient is its next value, or the sum of those that replicas propose.
    """
    if module.is_initializing():
        module.variable("gradient_stats", name, jnp.zeros, shape, jnp.float32)
    stat = module.get_variable("gradient_stats", name, jnp.zeros(shape, jnp.float32))
    # These zeros vary over the devices as `like` does, which shard_map has to know
    # before it sums what the devices propose.
    return stat + jnp.zeros_like(like, jnp.float32, ())
