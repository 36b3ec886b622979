"""Online Normalization: statistics that stream from image to image."""

from __future__ import annotations

import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from kalman_flax._filter.observe import observe
from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import normalize
from kalman_flax._kernels import hold
from kalman_flax.layers.normalizer import (
    Normalizer,
    Unfiltered,
    finite_or_old,
    gradient_stat,
)
from kalman_flax.layers.signal import Signal


class OnlineNorm(Unfiltered, Normalizer):
    r"""Normalises each image by statistics that stream through those before it.

    $$
    y_t = \frac{x_t - \mu_{t-1}}{\sqrt{\sigma_{t-1}^2 + \epsilon}}, \qquad
    z_t = \frac{\gamma y_t + \beta}
    {\sqrt{\mathrm{E}[(\gamma y_t + \beta)^2] + \epsilon}}
    $$

    $$
    \sigma_t^2 = a \sigma_{t-1}^2 + (1 - a) s_t + a (1 - a) (m_t - \mu_{t-1})^2, \qquad
    \mu_t = a \mu_{t-1} + (1 - a) m_t
    $$

    $m_t$ and $s_t$ are the mean and variance of a channel in image $t$, $a$ is
    `alpha_forward`. $z$ is what it puts out: the mean square is over the image, all
    channels included. $\gamma$ and $\beta$ are ``scale`` and ``bias``. The gradient $g$
    of $y$ becomes that of $x$, $k$, by the errors $v$ and $u$ that it accumulates, with
    $b$ = 1 - `alpha_backward`:

    $$
    h_t = g_t - b v_{t-1} y_t, \qquad v_t = v_{t-1} + \mathrm{E}[h_t y_t]
    $$

    $$
    k_t = \frac{h_t}{\sqrt{\sigma_{t-1}^2 + \epsilon}} - b u_{t-1}, \qquad
    u_t = u_{t-1} + \mathrm{E}[k_t]
    $$

    Source:
        Chiley et al., "Online Normalization for Training Neural Networks" (NeurIPS
        2019). Constants are from Cerebras/online-normalization, layer scaling is as in
        its experiments.

        One thing differs. R replicas run R streams from one state and average where
        they end, where the paper has one stream. So 1 / (1 - alpha) counts the images
        of one replica, R times as many in all: take ``alpha**R`` for the paper's
        horizon. The mean of u and v still is the sum of all errors / R, which keeps it
        bounded as the paper proves. Of the variance the average drops that between the
        new means, some (1 - a)^2 of the images'.

    Cost:
        - Parameters: 2 C.
        - Statistics: 4 C numbers.
        - Passes: about those of batch norm, and scans of ``[C]`` vectors over the
          images of a micro-batch.
        - Inference: a scale and a bias from the streaming statistics; with layer
          scaling a pass over each image for its mean square.

    When to use:
        Where micro-batches may be of one image.

    Variables:
        Parameters ``scale`` and ``bias``; in ``batch_stats`` the ``streaming_mean`` and
        ``streaming_var``; in ``gradient_stats`` ``u`` and ``v``, whose gradients are
        their next values; all ``[C]``. Whoever trains must differentiate with respect
        to those and store what comes. Where the collection is not passed to `apply`, it
        counts as zeros.

        u and v have the units of the gradients that flow: 1 / R of a single device's
        where the loss is a mean over R replicas. That is right for those they correct,
        as long as R, and any scale of the loss, stays the same.

    State:
        Ends. What a channel's moments over the micro-batch are is not known.

    Attributes:
        axis: of the channels.
        epsilon: added to the variance, and to the mean square of layer scaling.
        alpha_forward: decay of mean and variance at each image.
        alpha_backward: the same of the errors in the gradient.
        layer_scaling: divide the output by its root mean square; without it this is the
            paper's algorithm alone, whose errors grow from layer to layer.

    Raises:
        ValueError: a decay outside [0, 1).
    """

    axis: int = -1
    alpha_forward: float = 0.999
    alpha_backward: float = 0.99
    layer_scaling: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("alpha_forward", "alpha_backward"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; expected a number in [0, 1),"
                    " usually just below 1."
                )

    @nn.compact
    def __call__(
        self, x: Signal | jax.Array, use_running_average: bool | None = None
    ) -> Signal | jax.Array:
        """Normalises `x`, ``[N, ..., C]``; a Signal gives a Signal of unknown state.

        Args:
            x: a Signal or a plain array; its images count as coming one by one.
            use_running_average: True normalises all by the streaming statistics as
                they are (inference); False trains, and moves them.
        """
        inference = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        value = jnp.moveaxis(self._value(x), self.axis, -1)
        shape = value.shape[-1:]
        scale, bias = self._affine(value.shape[-1])
        # Not called mean and var: `merge_running` would add the variance between the
        # replicas by the weight of a micro-batch, but here each image has its own.
        wide = jnp.result_type(value, jnp.float32)
        mean = self.variable("batch_stats", "streaming_mean", jnp.zeros, shape, wide)
        var = self.variable("batch_stats", "streaming_var", jnp.ones, shape, wide)
        u, v = (gradient_stat(self, name, shape, value) for name in ("u", "v"))

        y = value.astype(wide)
        state = KalmanState(mean.value, var.value)
        if inference:
            y = normalize(y, state, epsilon=self.epsilon)
        else:
            before, after = _track(lax.stop_gradient(y), state, self.alpha_forward)
            y = cast(jax.Array, _control_mean(y, u, self.alpha_backward))
            y = normalize(y, before, epsilon=self.epsilon)
            y = cast(jax.Array, _control_projection(y, v, self.alpha_backward))
            if not self.is_initializing():
                mean.value, var.value = finite_or_old(after, state)

        y = y * scale + bias
        if self.layer_scaling:
            axes = tuple(range(1, y.ndim))
            square = jnp.mean(jnp.square(y), axes, keepdims=True)
            y *= lax.rsqrt(square + self.epsilon)
        return self._output(x, jnp.moveaxis(y, -1, self.axis), scale, bias)


def _stream(
    start: jax.Array, decay: jax.Array | float, new: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Runs s <- decay s + new over the images.

    All that is sequential, and it is linear: a scan over vectors, of log N steps.

    Args:
        start: ``[C]``.
        decay: scalar or ``[N, C]``.
        new: ``[N, C]``.

    Returns:
        s before each image ``[N, C]``, and after the last ``[C]``.
    """

    def join(
        first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    decay = jnp.broadcast_to(decay, new.shape)
    decay = jnp.concatenate([jnp.ones_like(decay[:1]), decay])
    new = jnp.concatenate([start[None], new])
    _, s = lax.associative_scan(join, (decay, new))
    # Keeps XLA:CPU from computing these small vectors again at every pixel.
    s = hold(s.astype(start.dtype))
    return s[:-1], s[-1]


def _track(
    x: jax.Array, state: KalmanState, alpha: float
) -> tuple[KalmanState, KalmanState]:
    """The statistics before each image, ``[N, C]``, and after the last, ``[C]``."""
    image = observe(x, "instance")
    means, mean = _stream(state.mean, alpha, (1 - alpha) * image.mean)
    spread = image.var + alpha * jnp.square(image.mean - means)
    variances, var = _stream(state.var, alpha, (1 - alpha) * spread)
    return KalmanState(means, variances), KalmanState(mean, var)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _control_projection(y: jax.Array, v: jax.Array, alpha: float) -> jax.Array:
    """The identity of y, which takes from its gradient what is along y, bit by bit.

    The gradient of `v` is its next value. The update is linear in v, v <- v (1 - b
    E[y^2]) + E[g y], so a scan over vectors will do.
    """
    return y


def _control_projection_forward(
    y: jax.Array, v: jax.Array, alpha: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return y, (y, v)


def _control_projection_backward(
    alpha: float, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    y, v = saved
    # Below 0 it would oscillate, and grow where statistics are far off, as they are at
    # the start. The authors' TensorFlow version has this bound too.
    decay = jnp.maximum(1 - (1 - alpha) * _image_mean(jnp.square(y)), 0.0)
    before, after = _stream(v, decay, _image_mean(g * y))
    return g - (1 - alpha) * _per_image(before, y) * y, after


_control_projection.defvjp(_control_projection_forward, _control_projection_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _control_mean(x: jax.Array, u: jax.Array, alpha: float) -> jax.Array:
    """The identity of x, which takes its mean from its gradient, bit by bit.

    The gradient of `u` is its next value.
    """
    return x


def _control_mean_forward(
    x: jax.Array, u: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
    return x, u


def _control_mean_backward(
    alpha: float, u: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    before, after = _stream(u, alpha, _image_mean(g))
    return g - (1 - alpha) * _per_image(before, g), after


_control_mean.defvjp(_control_mean_forward, _control_mean_backward)


def _image_mean(x: jax.Array) -> jax.Array:
    """Mean of every channel of every image, ``[N, C]``."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))


def _per_image(vectors: jax.Array, like: jax.Array) -> jax.Array:
    """``[N, C]`` to ``[N, 1, ..., 1, C]``."""
    spatial = (1,) * (like.ndim - 2)
    return vectors.reshape(vectors.shape[0], *spatial, vectors.shape[1])
