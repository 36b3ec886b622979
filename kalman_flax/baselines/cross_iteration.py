"""Cross-Iteration Batch Normalization: past micro-batches, moved to today's kernel."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from kalman_flax._filter.mixture import second_moment
from kalman_flax._filter.observe import observe
from kalman_flax._filter.predict import predict_affine
from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import normalize, update
from kalman_flax._kernels import hold
from kalman_flax.layers.linear import Conv
from kalman_flax.layers.normalizer import RunningNormalizer, Unfiltered
from kalman_flax.layers.signal import Signal, as_signal

_FAN_IN = (0, 1, 2)  # height, width and input channels of a kernel
_Past = dict[str, jax.Array]  # what is kept of an iteration


class ConvState(NamedTuple):
    """Moments of a convolution's output, and how they depend on its kernel.

    A `KalmanState` to every layer but `CrossIterationBatchNorm`; whatever lies between
    leaves only the moments.

    Attributes:
        mean, var: ``[D]``, of the micro-batch.
        kernel: ``[h, w, C / groups, D]``.
        mean_slope: ``[h, w, C / groups, groups]``, d mean / d kernel, the mean patch of
            the input, the same for all output channels of a group.
        var_slope: like `kernel`, d var / d kernel.
    """

    mean: jax.Array
    var: jax.Array
    kernel: jax.Array
    mean_slope: jax.Array
    var_slope: jax.Array


class CrossIterationConv(Conv):
    r"""`Conv` that also says how its output's moments depend on the kernel.

    $$
    \frac{\partial \mu}{\partial W} = E[\mathrm{patch}], \qquad
    \frac{\partial \sigma^2}{\partial W} = 2 \, E[\mathrm{patch} \, (y - \mu)]
    $$

    $\mu$ and $\sigma^2$ are the moments of the output $y$ over the micro-batch, and the
    patches are those of the input at each position.

    Source:
        The part of Yao et al. (2021) that the convolution has to play, see
        `CrossIterationBatchNorm`.

    Cost:
        - Parameters: those of `Conv`.
        - Statistics: none stored.
        - Passes: the gradient of the kernel once more, in the forward pass, in float32.
          Under `jit` nothing where nobody uses it, as before a sum.
        - Inference: nothing.

    When to use:
        Where `CrossIterationBatchNorm` follows.

    Variables:
        Parameters, and values, are those of `Conv`. With a `kernel_map`, W is what
        comes out of it: the moments are linear and quadratic in that.

    State:
        Hands on the moments and their slopes, constants to the gradient. What a change
        of the bias does is not told. `transition` and the state of the input are not
        used. A plain array gives a plain array.

    Attributes are those of `Conv`.

    Raises:
        ValueError: as in `Conv`, or not all of the input is valid.
    """

    def __call__(self, x: Signal | jax.Array) -> Signal | jax.Array:
        """Maps ``[..., H, W, C]`` to ``[..., H', W', features]``."""
        if not isinstance(x, Signal):
            return super().__call__(x)
        if x.valid is not None:
            raise ValueError(
                "CrossIterationConv got a Signal that is valid in places, but cannot"
                " leave the others out of what it observes; take another normaliser."
            )
        y = as_signal(super().__call__(x.value)).value
        kernel = jnp.asarray(self.used_kernel(), jnp.float32)
        mean, var = observe(y)
        patches, deviation = lax.stop_gradient((x.value, y - mean))
        # Like `y`, so that they vary over the devices as it does: under shard_map a
        # transpose takes nothing else.
        ones = jnp.ones_like(y, jnp.float32, (*y.shape[:-1], self.feature_group_count))
        mean_slope = self._mean_with_patches(ones, patches, kernel)
        var_slope = self._mean_with_patches(2.0 * deviation, patches, kernel)
        # A KalmanState to all that ask for no more, see there.
        state: Any = ConvState(mean, var, kernel, mean_slope, var_slope)
        return Signal(y, state)

    def _mean_with_patches(
        self, factor: jax.Array, patches: jax.Array, kernel: jax.Array
    ) -> jax.Array:
        """E[patch factor], the gradient of a convolution by its kernel.

        Args:
            factor: ``[N, H', W', D]``, D the features or the groups.
            patches: the input, ``[N, H, W, C]``.
            kernel: ``[h, w, C / groups, features]``; only its shape matters.

        Returns:
            ``[h, w, C / groups, D]``.
        """
        features = factor.shape[-1]
        conv = self.clone(
            parent=None,
            features=features,
            use_bias=False,
            kernel_map=None,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
        )

        def convolve(kernel: jax.Array) -> jax.Array:
            y: Any = conv.apply({"params": {"kernel": kernel}}, patches)
            return y

        shape = jax.ShapeDtypeStruct((*kernel.shape[:-1], features), jnp.float32)
        count = factor.size // features
        return jax.linear_transpose(convolve, shape)(factor / count)[0]


class CrossIterationBatchNorm(Unfiltered, RunningNormalizer):
    r"""Batch norm over the last micro-batches, the past ones moved to today's kernel.

    $$
    \mu'_\tau = \mu_\tau + \left\langle
    \frac{\partial \mu_\tau}{\partial W}, W_t - W_\tau \right\rangle, \qquad
    \nu'_\tau = \nu_\tau + \left\langle
    \frac{\partial \nu_\tau}{\partial W}, W_t - W_\tau \right\rangle
    $$

    $$
    \bar{\mu} = \frac{1}{n + 1} \Big(\mu_t + \sum_\tau \mu'_\tau\Big), \qquad
    \bar{\nu} = \frac{1}{n + 1} \Big(\nu_t + \sum_\tau \nu'_\tau\Big), \qquad
    \bar{\sigma}^2 = \bar{\nu} - \bar{\mu}^2
    $$

    $$
    y = \gamma \, \frac{x - \bar{\mu}}{\sqrt{\bar{\sigma}^2 + \epsilon}} + \beta
    $$

    $\mu$ and $\nu = E[x^2]$ are of a micro-batch, and $W$ is the kernel of the
    convolution before. The sums are over the $n$ past iterations $\tau$ that count, of
    the last `window` - 1.

    As a filter: the transition is not of a layer but of a step. The average over the
    compensated past is the prediction, and `update` combines it with today's
    observation with the gain 1 / (n + 1). By the rule "mixture" that is the average of
    mu and nu to the letter.

    Source:
        Yao, Cao, Zheng, Huang and Lin, "Cross-Iteration Batch Normalization" (CVPR
        2021), with the window of the configs in Howal/Cross-iterationBatchNorm.

        As in the official code, a past iteration whose $\nu'$ comes out below $\mu'^2$
        is dropped, channel by channel (the paper raises $\nu'$ to $\mu'^2$), and so is
        a slot not yet filled. As there, the past, with its change to today's kernel, is
        a constant to the gradient.

        Other than there:

        - epsilon is added to the variance and not to its root.
        - The moving averages are of the combined statistics and not of the
          micro-batch's, so that inference knows what training normalises by.
        - The past is kept in the burn-in too, so that the window is full when it ends.
        - All replicas share one past, the mean over their micro-batches, which is exact
          for mu, nu and slopes. The original keeps each device's own. So a past
          iteration knows more images than the current one, and weighs the same.

    Cost:
        - Parameters: 2 C.
        - Statistics: 2 C running ones, and `window` - 1 times two kernels and a mean
          patch.
        - Passes: those of batch norm; the slopes cost one more kernel gradient, see
          `CrossIterationConv`.
        - Inference: that of batch norm.

    When to use:
        For small micro-batches, once kernels change little per step (`burn_in`).

        Only right behind a `CrossIterationConv` does a norm look back; elsewhere it is
        batch norm. On the sum of a residual stream, to which all convolutions before
        have added on a par, the slopes of the last one do not account for most of the
        change. In the pre-activation `ResNet` ``stem_norm`` and every ``norm2`` look
        back. In the original, where a convolution comes before every norm, all do.

    Variables:
        Parameters ``scale`` and ``bias``, ``[C]``; in ``batch_stats`` the running
        ``mean`` and ``var``, ``[C]``, ``steps``, a float32 scalar, exact to 2^24, and
        ``past1`` (the latest), ``past2`` and so on. In these ``nu`` is taken about a
        ``reference``, which changes nothing but the rounding.

    State:
        Hands on the exact moments of its output over the micro-batch.

    Attributes are those of `nn.BatchNorm`, and:

    Attributes:
        axis_name: share statistics and slopes over this mapped axis.
        window: k, iterations that count, with the current one; 1 is batch norm.
        burn_in: training steps of batch norm at the start, while kernels change fast.
            Counted by ``steps``.

    Raises:
        ValueError: a window below 1 or a negative burn-in.
    """

    window: int = 4
    burn_in: int = 0

    ranges: ClassVar = {"window": (1, math.inf), "burn_in": (0, math.inf)}

    @nn.compact
    def __call__(
        self, x: Signal | jax.Array, use_running_average: bool | None = None
    ) -> Signal | jax.Array:
        """Normalises; a Signal gives a Signal.

        Args:
            x: ``[N, ..., C]``, a Signal or a plain array.
            use_running_average: True normalises by the moving statistics (inference);
                False by those of the window, and moves window and averages.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        value = self._value(x)
        observed = state = running = self._running(value, self.axis)
        scale, bias = self._affine(value.shape[self.axis])

        training = not use_running_average
        if training:
            observed = state = self._observe(value, axis=self.axis)
        conv = x.state if isinstance(x, Signal) else None
        if isinstance(conv, ConvState) and (training or self.is_initializing()):
            state = self._look_back(observed, conv)
        if training:
            self._move_running(running, state)

        y = normalize(value, state, scale, bias, epsilon=self.epsilon, axis=self.axis)
        slope = scale * lax.rsqrt(state.var + self.epsilon)
        moments = predict_affine(observed, slope, bias - slope * state.mean)
        return self._output(x, y, scale, bias, state=moments)

    def _look_back(self, observed: KalmanState, conv: ConvState) -> KalmanState:
        """Combines what was observed with the past, and keeps it as the latest past."""
        past = [
            self.variable("batch_stats", f"past{age}", _empty, conv)
            for age in range(1, self.window)
        ]
        steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.float32)
        if self.is_initializing() or not past:
            return observed
        predicted, count = _average([_compensate(p.value, conv.kernel) for p in past])
        count = jnp.where(steps.value >= self.burn_in, count, 0.0)
        predicted, count = lax.stop_gradient((predicted, count))

        # All replicas know the latest mean, and the next one is close to it.
        latest = _remember(conv, reference=past[0].value["mu"])
        if self.axis_name is not None:
            latest = lax.pmean(
                latest, self.axis_name, axis_index_groups=self.axis_index_groups
            )
        for older, newer in reversed(list(zip(past[1:], past))):
            older.value = newer.value
        past[0].value = latest
        steps.value += 1.0
        # Held as in KalmanNorm.
        return hold(update(predicted, observed, 1.0 / (count + 1)))


def _empty(conv: ConvState) -> _Past:
    """A slot not yet filled: its nu is below 0, so that it does not count."""
    return {
        "mu": jnp.zeros_like(conv.mean),
        "nu": -jnp.ones_like(conv.var),
        "reference": jnp.zeros_like(conv.mean),
        "mu_slope": jnp.zeros_like(conv.mean_slope),
        "nu_slope": jnp.zeros_like(conv.var_slope),
        "kernel": jnp.zeros_like(conv.kernel),
    }


def _remember(conv: ConvState, reference: jax.Array) -> _Past:
    """mu, nu = E[(x - reference)^2] and their slopes, constants to the gradient."""
    offset = conv.mean - reference
    mu_slope = _per_channel(conv.mean_slope, conv.kernel)
    past = {
        "mu": conv.mean,
        "nu": second_moment(KalmanState(conv.mean, conv.var), reference),
        "reference": reference,
        "mu_slope": conv.mean_slope,
        "nu_slope": conv.var_slope + 2.0 * offset * mu_slope,
        "kernel": conv.kernel,
    }
    return lax.stop_gradient(past)


def _compensate(past: _Past, kernel: jax.Array) -> KalmanState:
    """A past iteration's moments, had `kernel` been the kernel; to first order."""
    change = kernel - past["kernel"]
    mu_slope = _per_channel(past["mu_slope"], kernel)
    mu = past["mu"] + jnp.sum(mu_slope * change, _FAN_IN)
    nu = past["nu"] + jnp.sum(past["nu_slope"] * change, _FAN_IN)
    return KalmanState(mu, nu - jnp.square(mu - past["reference"]))


def _average(states: list[KalmanState]) -> tuple[KalmanState, jax.Array]:
    """The mixture, channel by channel, of those with a variance, and their number."""
    mean, var = (jnp.stack(stat) for stat in zip(*states))
    valid = (var >= 0.0) & jnp.isfinite(var)  # nor where the moments overflowed
    count = jnp.sum(valid, axis=0, dtype=jnp.float32)

    def average(stat: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid, stat, 0.0), axis=0) / jnp.maximum(count, 1.0)

    centre = average(mean)
    spread = average(second_moment(KalmanState(mean, var), centre))
    return KalmanState(centre, spread), count


def _per_channel(slope: jax.Array, kernel: jax.Array) -> jax.Array:
    """Repeats ``[..., groups]`` for the output channels of each group."""
    return jnp.repeat(slope, kernel.shape[-1] // slope.shape[-1], axis=-1)
