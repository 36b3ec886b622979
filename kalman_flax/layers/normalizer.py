"""What normalisers share: two steps, scale and bias, running moments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.linen.dtypes import canonicalize_dtype

from kalman_flax._filter.observe import observe, observe_about
from kalman_flax._filter.state import KalmanState
from kalman_flax.layers.checks import Checked
from kalman_flax.layers.signal import Signal, as_signal

Tree = TypeVar("Tree")


@struct.dataclass
class Filtered:
    """What the first step of a normaliser, `filter`, returns, and only the second step,
    `normalize`, takes: a value that is not normalised yet.

    Attributes:
        value: ``[N, ..., C]``.
        moments: of the value, by which it is to be normalised, ``[C]``, or ``[N, C]``
            of each example; of a normaliser that does all in its second step, what it
            was told of them, or None.
        valid: as of a Signal.
    """

    value: jax.Array
    moments: KalmanState | None
    valid: jax.Array | None = None

    @property
    def signal(self) -> Signal:
        """The value as it is, for the shortcut of a pre-activation network."""
        return Signal(self.value, self.moments, self.valid)


class Affine(Checked):
    """Mixin: the scale and bias of a normaliser, and how its output leaves it."""

    # What the module has that mixes this in.
    dtype: Any
    param_dtype: Any
    use_bias: bool
    use_scale: bool
    bias_init: nn.initializers.Initializer
    scale_init: nn.initializers.Initializer
    param: Callable[..., Any]

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
        """`y` in its dtype, see `_cast`; for a Signal a Signal, with `state`."""
        y = self._cast(as_signal(x).value, y, *parameters)
        return Signal(y, state, x.valid) if isinstance(x, Signal) else y

    def _cast(
        self, value: jax.Array, y: jax.Array, *parameters: jax.Array | float
    ) -> jax.Array:
        """`y` in the dtype that `nn.BatchNorm` gives for `value` and `parameters`."""
        return y.astype(canonicalize_dtype(value, *parameters, dtype=self.dtype))


class Running(Checked):
    """Mixin: the running ``mean`` and ``var`` of `nn.BatchNorm`."""

    # What the module has that mixes this in.
    momentum: float
    axis_name: str | Sequence[str] | None
    axis_index_groups: Any
    variable: Callable[..., Any]
    put_variable: Callable[..., None]

    def _running(self, value: jax.Array, axis: int = -1) -> KalmanState:
        """The running moments of the channels of `value`, before this step."""
        shape, dtype = (value.shape[axis],), jnp.result_type(value, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, dtype)
        return KalmanState(mean.value, var.value)

    def _observe(
        self,
        value: jax.Array,
        *,
        axis: int = -1,
        mask: jax.Array | None = None,
        guess: jax.Array | None = None,
        alone: bool = True,
    ) -> KalmanState:
        """The moments of the micro-batch, shared over `axis_name`.

        Args:
            value: ``[N, ..., C]``.
            axis, mask: as in `observe`.
            guess: as in `observe_about`; not used with a shared axis.
            alone: nothing else is normalised by, see `_check_batch`.
        """
        self._check_batch(value, alone=alone)
        axis_name = None if self.is_initializing() else self.axis_name
        if guess is not None and axis_name is None:
            return observe_about(value, guess, axis, mask)
        return observe(
            value,
            axis=axis,
            mask=mask,
            axis_name=axis_name,
            axis_index_groups=self.axis_index_groups,
        )

    def _move_running(self, running: KalmanState, state: KalmanState) -> None:
        """Moves the `running` moments towards `state`, but not in initialisation."""
        if self.is_initializing():
            return
        kept = self.momentum
        moved = jax.tree.map(
            lambda old, new: kept * old + (1 - kept) * new, running, state
        )
        for name, stat in finite_or_old(moved, running)._asdict().items():
            self.put_variable("batch_stats", name, stat)


def finite_or_old(new: Tree, old: Tree) -> Tree:
    """`new`, but `old` in the channels where anything in it is infinite or NaN.

    A micro-batch whose moments overflow, as those of values at 1e20 do, would leave a
    moving average infinite for good: it moves none.

    Args:
        new, old: trees of statistics that belong together, ``[..., C]``.
    """
    finite = functools.reduce(
        jnp.logical_and,
        (
            jnp.all(jnp.isfinite(leaf), axis=tuple(range(leaf.ndim - 1)))
            for leaf in jax.tree.leaves(new)
        ),
    )
    return jax.tree.map(lambda *leaves: jnp.where(finite, *leaves), new, old)


class Unfiltered(Checked):
    """Mixin for normalisers that use no prediction: their first step does nothing.

    With it a network that calls `filter` and `normalize` apart serves them all.
    """

    def filter(self, x: Signal | jax.Array) -> Filtered:
        """Returns `x` as it is."""
        x = as_signal(x)
        return Filtered(x.value, x.state, x.valid)

    def normalize(self, x: Filtered) -> Signal:
        """Observes and normalises, all in the second step.

        Raises:
            ValueError: something else than `filter` returns.
        """
        check_filtered(self, x)
        return self(x.signal)  # pyright: ignore[reportCallIssue]


def check_filtered(norm: object, x: object) -> Filtered:
    """Returns `x`.

    Raises:
        ValueError: it is not `Filtered`.
    """
    if isinstance(x, Filtered):
        return x
    raise ValueError(
        f"{type(norm).__name__}.normalize got {type(x).__name__}; expected what its"
        " first step returns: norm.normalize(norm.filter(x)), or norm(x) for both."
    )


def filtered_moments(norm: object, x: object) -> KalmanState:
    """The moments of what `filter` of a Kalman normaliser returned.

    Raises:
        ValueError: something else came, or from a normaliser that does not filter.
    """
    moments = check_filtered(norm, x).moments
    if moments is None:
        raise ValueError(
            f"{type(norm).__name__}.normalize got a value without moments, from the"
            " first step of a normaliser that observes in its second; expected that of"
            " its own."
        )
    return moments


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
    """Base of normalisers with the attributes of `nn.BatchNorm`, in its order.

    Attributes:
        use_fast_variance: accepted, and without effect: moments are always centred.
        force_float32_reductions: accepted where true: statistics never have less.

    Raises:
        ValueError: float32 reductions are not wanted.
    """

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
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True

    def __post_init__(self):
        if self.force_float32_reductions is False:
            raise ValueError(
                f"{type(self).__name__} takes statistics in float32 or wider; leave out"
                " force_float32_reductions=False, which nn.BatchNorm has for less."
            )
        super().__post_init__()


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
