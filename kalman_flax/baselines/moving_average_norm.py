"""Moving Average Batch Normalization: stable statistics in both passes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import normalize
from kalman_flax.layers.normalizer import (
    Normalizer,
    Unfiltered,
    finite_or_old,
    gradient_stat,
)
from kalman_flax.layers.signal import Signal


class MovingAverageBatchNorm(Unfiltered, Normalizer):
    r"""Divides by a moving root mean square, and corrects the gradient likewise (MABN).

    $$
    z = \frac{x}{\sqrt{M + \epsilon}}, \qquad y = \gamma r z + \beta, \qquad
    r = \mathrm{clip}\left(\sqrt{\frac{M + \epsilon}{m + \epsilon}},
    \frac{1}{r_{\max}}, r_{\max}\right)
    $$

    $$
    \frac{\partial L}{\partial x} = \frac{g - z P}{\sqrt{M + \epsilon}}, \qquad
    g = \gamma r \frac{\partial L}{\partial y}
    $$

    $M$ is the mean of $E[x^2]$ over the last `window` micro-batches, and $P$ that of
    $E[g z]$ over the same. $m$ is the running ``mean_square`` before this step, which
    moves with $M$. $r$ is a constant to the gradient, $r_{\max}$ is `max_renorm`.
    $\gamma$ and $\beta$ are ``scale`` and ``bias``.

    Until enough has been seen, $M$ and $P$ are those of the micro-batch alone, which
    gives the exact gradient, and $r$ is 1.

    Source:
        Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of
        Batch Normalization" (ICLR 2020). Constants are from MABN.py of
        megvii-model/MABN, and so are both warm-ups.

        One thing differs. Replicas share the step, so all write one slot, and their
        average is the mean over their micro-batches. The original keeps each device's
        own. Here only the current slot is a replica's own.

    Cost:
        - Parameters: 2 C.
        - Statistics: ``(2 window + 1) C + 1`` numbers.
        - Passes: those of batch norm, less its centring.
        - Inference: a scale and a bias.

    When to use:
        For micro-batches of few images, after convolutions with centred kernels
        (``Conv(kernel_map=centre_kernel)``), since it does not centre what it
        normalises.

    Variables:
        Parameters ``scale`` and ``bias``, ``[C]``; in ``batch_stats`` the running
        ``mean_square``, ``[C]``, the ``history`` of $E[x^2]$, ``[window, C]``, and
        ``step``; in ``gradient_stats`` the ``history`` of $E[g z]$, ``[window, C]``,
        whose gradient is its next value. Whoever trains must differentiate with respect
        to it and store what comes. Where the collection is not passed to `apply`, it
        counts as zeros.

        $E[g z]$ is in the units of the gradient g that flows: 1 / R of a single
        device's where the loss is a mean over R replicas. That is right for the g it
        corrects, as long as R, and any scale of the loss, stays the same.

    State:
        Ends. The mean of its output is not known.

    Attributes:
        axis: of the channels.
        momentum: what the running statistic keeps in a step.
        axis_name: share E[x^2] and E[g z] over this mapped axis; None leaves each
            device its own. Take the gradient inside the mapped function: JAX does not
            know the axis in a backward pass outside it.
        window: micro-batches that M and P average over, 16 in the paper.
        warmup_steps: before this step, and until the window is full, M and P are the
            micro-batch's.
        renorm_warmup_steps: up to this step, and `warmup_steps`, r is 1.
        max_renorm: limit of r, and inverse of the lower one.

    Raises:
        ValueError: an attribute outside its range.
    """

    axis: int = -1
    momentum: float = 0.98
    axis_name: str | Sequence[str] | None = None
    window: int = 16
    warmup_steps: int = 100
    renorm_warmup_steps: int = 1000
    max_renorm: float = 5.0

    ranges: ClassVar = {
        "window": (1, math.inf),
        "warmup_steps": (0, math.inf),
        "renorm_warmup_steps": (0, math.inf),
        "max_renorm": (1.0, math.inf),
    }

    @nn.compact
    def __call__(
        self, x: Signal | jax.Array, use_running_average: bool | None = None
    ) -> Signal | jax.Array:
        """Normalises `x`, ``[N, ..., C]``; a Signal gives a Signal of unknown state.

        Args:
            x: a Signal or a plain array.
            use_running_average: True divides by the running statistic (inference);
                False trains, and moves the histories.
        """
        inference = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        value = jnp.moveaxis(self._value(x), self.axis, -1)
        shape, slots = value.shape[-1:], (self.window, value.shape[-1])
        wide = jnp.result_type(value, jnp.float32)
        scale, bias = self._affine(value.shape[-1])
        running = self.variable("batch_stats", "mean_square", jnp.ones, shape, wide)
        history = self.variable("batch_stats", "history", jnp.zeros, slots, wide)
        step = self.variable("batch_stats", "step", jnp.zeros, (), jnp.float32)
        projections = gradient_stat(self, "history", slots, value)

        if inference:
            z = normalize(value, KalmanState(0.0, running.value), epsilon=self.epsilon)
        else:
            self._check_batch(jnp.moveaxis(value, -1, self.axis))
            # From 1, as in the original; rounded, because replicas average it.
            count = jnp.round(step.value) + 1.0
            slot = count.astype(jnp.int32) % self.window
            alone = (count <= self.window) | (count < self.warmup_steps)
            axis_name = None if self.is_initializing() else self.axis_name
            square = jnp.square(lax.stop_gradient(value).astype(wide))
            squares, mean_square = _move(
                history.value, _mean(square, axis_name), slot, alone
            )
            z = normalize(value, KalmanState(0.0, mean_square), epsilon=self.epsilon)
            z = cast(jax.Array, _stabilise(z, projections, slot, alone, axis_name))
            z *= self._renorm(mean_square, running.value, count)
            if not self.is_initializing():
                kept = self.momentum
                moved = kept * running.value + (1 - kept) * mean_square
                running.value, history.value = finite_or_old(
                    (moved, squares), (running.value, history.value)
                )
                step.value = count

        y = jnp.moveaxis(z * scale + bias, -1, self.axis)
        return self._output(x, y, scale, bias)

    def _renorm(
        self, mean_square: jax.Array, running: jax.Array, count: jax.Array
    ) -> jax.Array:
        r = jnp.sqrt((mean_square + self.epsilon) / (running + self.epsilon))
        r = jnp.clip(r, 1.0 / self.max_renorm, self.max_renorm)
        warm = count > max(self.renorm_warmup_steps, self.warmup_steps)
        return jnp.where(warm, r, 1.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _stabilise(
    z: jax.Array,
    history: jax.Array,
    slot: jax.Array,
    alone: jax.Array,
    axis_name: str | Sequence[str] | None,
) -> jax.Array:
    """The identity of z, whose gradient is g - z P instead of g.

    Written on z, it leaves the division by the statistic, taken for a constant, to
    automatic differentiation. The gradient of `history` is its next value.
    """
    return z


def _stabilise_forward(
    z: jax.Array,
    history: jax.Array,
    slot: jax.Array,
    alone: jax.Array,
    axis_name: str | Sequence[str] | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return z, (z, history, slot, alone)


def _stabilise_backward(
    axis_name: str | Sequence[str] | None, saved: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array | None, ...]:
    z, history, slot, alone = saved
    history, projection = _move(history, _mean(g * z, axis_name), slot, alone)
    return g - z * projection, history, None, None


_stabilise.defvjp(_stabilise_forward, _stabilise_backward)


def _move(
    history: jax.Array, new: jax.Array, slot: jax.Array, alone: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The history with `new` in its slot, and the moving mean; `new` while `alone`."""
    history = history.at[slot].set(new)
    return history, jnp.where(alone, new, jnp.mean(history, axis=0))


def _mean(x: jax.Array, axis_name: str | Sequence[str] | None) -> jax.Array:
    """Mean of every channel, ``[C]``."""
    mean = jnp.mean(x, axis=tuple(range(x.ndim - 1)))
    return mean if axis_name is None else lax.pmean(mean, axis_name)
