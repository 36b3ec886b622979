"""Batch Renormalization: batch statistics, corrected towards the moving ones."""

from __future__ import annotations

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import normalize, normalized_state
from kalman_flax.layers.normalizer import RunningNormalizer, Unfiltered
from kalman_flax.layers.signal import Signal


class BatchRenorm(Unfiltered, RunningNormalizer):
    r"""Batch norm whose statistics are corrected towards the moving ones.

    $$
    \hat{x} = \frac{x - \mu_B}{\sigma_B} \, r + d, \qquad y = \gamma \hat{x} + \beta
    $$

    $$
    r = \mathrm{clip}\left(\frac{\sigma_B}{\sigma},
    \frac{1}{r_{\max}}, r_{\max}\right), \qquad
    d = \mathrm{clip}\left(\frac{\mu_B - \mu}{\sigma}, -d_{\max}, d_{\max}\right)
    $$

    $\mu_B$ and $\sigma_B$ are of the micro-batch. $\mu$ and $\sigma$ are the moving
    statistics before this step. $r$ and $d$ are constants to the gradient. Where
    nothing is clipped, $\hat{x} = (x - \mu) / \sigma$, as in inference.

    Source:
        Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
        Batch-Normalized Models" (NIPS 2017), whose ramp and bounds are the defaults:
        plain batch norm for 5k steps; then `r_max` rises linearly from 1 to 3 at step
        40k, and `d_max` from 0 to 5 at step 25k.

        One thing differs. The paper averages the standard deviation, $\sqrt{\sigma_B^2
        + \epsilon}$. Here ``var`` holds the average of the variance, and $\sigma$ is
        its root, epsilon added, as in `nn.BatchNorm`: so checkpoints, the merging of
        replicas and the recomputation of population statistics serve both. By Jensen's
        inequality this $\sigma$ is a little larger than the paper's, the more so the
        more $\sigma_B$ varies.

    Cost:
        - Parameters: 2 C, as batch norm.
        - Statistics: 2 C running ones, as batch norm, and a step counter.
        - Passes: those of batch norm, with as much in memory, and some arithmetic per
          channel.
        - Inference: that of batch norm.

    When to use:
        For small or dependent micro-batches in long runs. Shorten the ramp with the
        run: one that ends within `warmup_steps` is batch norm.

    Variables:
        Parameters ``scale`` and ``bias``, ``[C]``; in ``batch_stats`` the running
        ``mean`` and ``var``, ``[C]``, and ``steps``, a float32 scalar, exact to 2^24.

    State:
        Hands on the moments of its output over the micro-batch: mean $\gamma d + \beta$
        and variance $(\gamma r)^2$, where $\sigma_B^2 / (\sigma_B^2 + \epsilon)$ is
        taken as 1. In inference those of batch norm.

    Attributes are those of `nn.BatchNorm`, and:

    Attributes:
        r_max: final bound of r, at least 1.
        d_max: final bound of d, at least 0.
        warmup_steps: training steps of plain batch norm.
        r_steps: the training step at which `r_max` is reached, not before the end of
            the warm-up. Counted by ``steps``.
        d_steps: the same of `d_max`.

    Raises:
        ValueError: a bound or a step outside its range.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup_steps: int = 5_000
    r_steps: int = 40_000
    d_steps: int = 25_000

    ranges: ClassVar = {"r_max": (1.0, math.inf), "d_max": (0.0, math.inf)}

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.warmup_steps <= min(self.r_steps, self.d_steps):
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, r_steps {self.r_steps} and"
                f" d_steps {self.d_steps}; the bounds rise from warmup_steps, at least"
                " 0, to r_steps and d_steps, so neither may come before it."
            )

    @nn.compact
    def __call__(
        self,
        x: Signal | jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Signal | jax.Array:
        """Normalises; a Signal gives a Signal.

        Args:
            x: ``[N, ..., C]``, a Signal or a plain array.
            use_running_average: True normalises by the moving statistics alone; False
                by the corrected ones of this micro-batch, which moves the averages.
            mask: broadcastable to `x`; values where it is false do not count.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        value, mask = self._masked(x, mask)
        state = running = self._running(value, self.axis)
        steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.float32)
        slope, offset = scale, bias = self._affine(value.shape[self.axis])

        if not use_running_average:
            state = self._observe(value, axis=self.axis, mask=mask)
            r, d = self._correction(state, running, steps.value)
            # The correction goes between normalisation, and scale and bias.
            slope, offset = scale * r, scale * d + bias
            self._move_running(running, state)
            if not self.is_initializing():
                steps.value += 1.0
        y = normalize(value, state, slope, offset, epsilon=self.epsilon, axis=self.axis)
        state = normalized_state(slope, offset)
        return self._output(x, y, scale, bias, state=state)

    def _correction(
        self, observed: KalmanState, running: KalmanState, steps: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """r and d of the paper, ``[C]``, within the bounds of this step."""

        def risen(end: int) -> jax.Array:
            """0 to the last step of the warm-up, 1 from step `end` on."""
            last = self.warmup_steps - 1
            return jnp.clip((steps - last) / (end - last), 0.0, 1.0)

        r_max = 1.0 + (self.r_max - 1.0) * risen(self.r_steps)
        d_max = self.d_max * risen(self.d_steps)
        std = jnp.sqrt(running.var + self.epsilon)
        r = jnp.sqrt(observed.var + self.epsilon) / std
        d = (observed.mean - running.mean) / std
        return jax.lax.stop_gradient(
            (jnp.clip(r, 1.0 / r_max, r_max), jnp.clip(d, -d_max, d_max))
        )
