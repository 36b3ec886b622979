"""Batch-Channel Normalization: moving averages in training, then groups of channels."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from kalman_flax._filter.observe import observe
from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import normalize
from kalman_flax.layers.normalizer import RunningNormalizer, Unfiltered, finite_or_old
from kalman_flax.layers.signal import Signal


class BatchChannelNorm(Unfiltered, RunningNormalizer):
    r"""Normalises by moving averages in training too, then by groups of channels.

    $$
    u = \gamma \, \frac{x - r}{\sqrt{v + \epsilon}} + \beta, \qquad
    y = \gamma_g \, \frac{u - \mu_{ng}}{\sqrt{\sigma_{ng}^2 + \epsilon}} + \beta_g
    $$

    $\mu_{ng}$ and $\sigma_{ng}^2$ are the moments of $u$ over the channels of group $g$
    of example $n$. Training moves the averages first, with $a$ = `momentum`, and takes
    them for constants:

    $$
    r \leftarrow a r + (1 - a) \, E[x], \qquad
    v \leftarrow a v + (1 - a) \, E[(x - r_{\mathrm{old}})^2]
    $$

    The moving averages keep a channel from being switched off for good. The groups make
    up for their lag.

    Source:
        The micro-batch form of Qiao et al., "Rethinking Normalization and Elimination
        Singularity in Neural Networks" (2019), as
        joe-siyuan-qiao/Batch-Channel-Normalization has it. There 1 - a is set from
        outside, and how is not said. Its default here is batch norm's, a guess.

    Cost:
        - Parameters: 2 C + 2 `num_groups`.
        - Statistics: 2 C moving averages.
        - Passes: those of batch norm and of group norm together.
        - Inference: the pass of group norm, so it does not fold into a convolution.

    When to use:
        For micro-batches of few images, with standardised kernels as the authors do:
        ``"batch_channel_ws"``.

    Variables:
        Parameters ``scale`` and ``bias``, ``[C]``, ``group_scale`` and ``group_bias``,
        ``[num_groups]``; in ``batch_stats`` ``streaming_mean`` and ``streaming_var``,
        ``[C]``.

        Replicas start a step from the same r and v. The mean of what they write is
        exactly what one micro-batch of all their images would have written: the spread
        is about one point, r_old, so it misses no variance between replicas. Until they
        are merged, each normalises by its own.

    State:
        Ends. What a channel's moments are after the groups is not known.

    Attributes are those of `nn.BatchNorm`, and:

    Attributes:
        num_groups: a divisor of the channel count.

    Raises:
        ValueError: num_groups does not divide the channels.
    """

    num_groups: int = 32

    @nn.compact
    def __call__(
        self,
        x: Signal | jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Signal | jax.Array:
        """Normalises; a Signal gives a Signal of unknown state.

        Args:
            x: ``[N, ..., C]``, a Signal or a plain array.
            use_running_average: True leaves the moving averages as they are, for
                inference; False trains, and moves them first.
            mask: broadcastable to `x`; values where it is false do not count.
        """
        inference = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        value, mask = self._masked(x, mask)
        channels, dtype = value.shape[self.axis], jnp.result_type(value, jnp.float32)
        scale, bias = self._affine(channels)
        # Not called mean and var: to that pair `merge_running` would add the variance
        # between the replicas, which is in here already.
        mean = self.variable(
            "batch_stats", "streaming_mean", jnp.zeros, (channels,), dtype
        )
        var = self.variable(
            "batch_stats", "streaming_var", jnp.ones, (channels,), dtype
        )
        state = KalmanState(mean.value, var.value)
        if not inference:
            seen = self._observe(lax.stop_gradient(value), axis=self.axis, mask=mask)
            about_old = seen.var + jnp.square(seen.mean - state.mean)
            kept = self.momentum
            moved = KalmanState(
                kept * state.mean + (1 - kept) * seen.mean,
                kept * state.var + (1 - kept) * about_old,
            )
            state = finite_or_old(moved, state)
            if not self.is_initializing():
                mean.value, var.value = state

        on_channels = {"epsilon": self.epsilon, "axis": self.axis}
        u = normalize(value, state, scale, bias, **on_channels)
        groups = observe(
            u, "group", num_groups=self.num_groups, axis=self.axis, mask=mask
        )
        group_scale, group_bias = self._group_affine()
        size = channels // self.num_groups
        y = normalize(
            u,
            groups,
            jnp.repeat(group_scale, size),
            jnp.repeat(group_bias, size),
            **on_channels,
        )
        return self._output(x, y, scale, bias, group_scale, group_bias)

    def _group_affine(self) -> tuple[jax.Array, jax.Array]:
        shape = (self.num_groups,)
        scale, bias = jnp.ones(shape), jnp.zeros(shape)
        if self.use_scale:
            scale = self.param("group_scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = self.param("group_bias", self.bias_init, shape, self.param_dtype)
        return scale, bias
