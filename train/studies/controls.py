"""What an ablation puts in place of a part of the filter, under names of its own.

Each takes one thing away from `KalmanNorm` or changes what it is told; none is meant
for use. They are chosen like the normalisers, ``--config.norm=control_shuffled``, with
``--config.plugins=train.studies.controls``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kalman_flax import Conv, KalmanNorm, KalmanState, Normalization, Signal
from kalman_flax._filter.calibration import Correction
from kalman_flax._filter.convolution import predict_conv
from kalman_flax.layers.kalman_norm import Parameters
from kalman_flax.layers.normalizer import Filtered
from kalman_flax.layers.signal import as_signal


class ShuffledKalmanNorm(KalmanNorm):
    """Gives every channel the prediction of another: the distribution over channels of
    what is predicted stays, what it says about this channel is gone."""

    def filter(self, x: Signal, *args: Any, **kwargs: Any) -> Filtered:
        """Filters with the prediction rolled by half of the channels."""
        return super().filter(_with_state(x, _rolled), *args, **kwargs)


class MovingKalmanNorm(KalmanNorm):
    """Puts the moving averages in the place of the prediction."""

    def filter(self, x: Signal, *args: Any, **kwargs: Any) -> Filtered:
        """Filters with the running mean and variance as what was predicted."""
        mean = self.get_variable("batch_stats", "mean", 0.0)
        var = self.get_variable("batch_stats", "var", 1.0)
        x = as_signal(x).replace(state=KalmanState(mean, var))
        return super().filter(x, *args, **kwargs)


class ConstantKalmanNorm(KalmanNorm):
    """Keeps the gradient out of the prediction: the layers below see it as a constant,
    where in the paper it flows through their weights."""

    def filter(self, x: Signal, *args: Any, **kwargs: Any) -> Filtered:
        """Filters with a prediction that has no gradient."""
        return super().filter(_with_state(x, lax.stop_gradient), *args, **kwargs)


class OpeningKalmanNorm(KalmanNorm):
    """With `calibrate`: a gain of max(q, 1 / (1 + t)) in the t-th update, which trusts
    observations until there are some to correct predictions by; for a run that begins
    without passes that set its statistics."""

    def _variables(self, value: jax.Array) -> tuple[Parameters, KalmanState]:
        parameters, running = super()._variables(value)
        weight = self.get_variable("batch_stats", "weight")
        if weight is None:  # in inference it may be gone
            return parameters, running
        t = jnp.log1p(-weight) / jnp.log(self.momentum)  # of n = 1 - k^t
        gain = jnp.maximum(parameters.gain, 1.0 / (1.0 + t))
        return parameters._replace(gain=gain), running


class ConstantCorrectionKalmanNorm(KalmanNorm):
    """With `calibrate`: keeps for good the correction that it was seeded with."""

    def _learn(
        self, correction: Correction, *args: Any, momentum: float | None = None
    ) -> Correction:
        if momentum is None:
            return correction
        return super()._learn(correction, *args, momentum=momentum)


class BorderlessConv(Conv):
    """Predicts as if the map had no border: every tap always inside."""

    def __call__(self, x: Signal) -> Signal:
        """Convolves; the state moves through the sums of the kernel over its taps."""
        y = as_signal(super().__call__(x))
        if x.state is None or y.state is None:
            return y
        kernel = self.used_kernel()
        # A VALID convolution of a map of the kernel's own size has no border.
        state = predict_conv(x.state, kernel, kernel.shape[:2], padding="VALID")
        return y.replace(state=state)


class ForgetfulConv(Conv):
    """Forgets the state behind the last convolution of a residual branch, so that the
    state of the stream is unknown after every sum: only the normalisers inside the
    branches filter."""

    def __call__(self, x: Signal) -> Signal:
        """Convolves; at the end of a branch the state ends."""
        y = as_signal(super().__call__(x))
        return y.replace(state=None) if self.name == "conv2" else y


def _with_state(x: Signal, change: Any) -> Signal:
    x = as_signal(x)
    return x if x.state is None else x.replace(state=change(x.state))


def _rolled(state: KalmanState) -> KalmanState:
    def roll(stat: Any) -> Any:  # a float stands for all channels alike
        return jnp.roll(stat, jnp.shape(stat)[-1] // 2, -1) if jnp.ndim(stat) else stat

    return jax.tree.map(roll, state)


#: as a plugin of a config has them, see `train.engine.plugins`
NORMALIZERS = {
    "control_shuffled": Normalization(ShuffledKalmanNorm),
    "control_moving": Normalization(MovingKalmanNorm),
    "control_constant": Normalization(ConstantKalmanNorm),
    "control_opening": Normalization(OpeningKalmanNorm),
    "control_constant_correction": Normalization(ConstantCorrectionKalmanNorm),
    "control_no_border": Normalization(KalmanNorm, conv=BorderlessConv),
    "control_no_stream": Normalization(KalmanNorm, conv=ForgetfulConv),
}
