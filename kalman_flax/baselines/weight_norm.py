"""Weight normalisation: convolutions of learned length, and a bias for a normaliser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from kalman_flax._filter.predict import predict_affine
from kalman_flax.layers.linear import Conv
from kalman_flax.layers.normalizer import Unfiltered
from kalman_flax.layers.signal import Signal, through

_HALF = nn.initializers.constant(0.5)


def weight_norm_conv(
    features: int,
    kernel_size: Sequence[int],
    *,
    scale_init: nn.initializers.Initializer = _HALF,
    name: str | None = None,
    **options: Any,
) -> nn.WeightNorm:
    r"""`Conv` whose kernels have a learned length, apart from their direction.

    $$
    w = g \, \frac{v}{\lVert v \rVert}
    $$

    $g$ is the length, and $v$ the direction, of each output feature.

    Source:
        Salimans and Kingma, "Weight Normalization: A Simple Reparameterization to
        Accelerate Training of Deep Neural Networks" (NIPS 2016). It is `nn.WeightNorm`
        around `Conv`, so it predicts with w.

        The paper initialises g from a batch, such that every output has variance 1.
        Here, where networks are initialised without data, g starts at a number. A ReLU
        halves the second moment, so a residual block of two convolutions adds g^4 / 4
        to the variance of the stream. With 0.5 that is nothing to speak of. With 1,
        Flax's default, it is a quarter. With sqrt(2), the length of He's kernels, it is
        all of it: networks without normalisers then need a far smaller learning rate,
        or diverge.

    Cost:
        - Parameters: one per feature, g.
        - Statistics: none; nothing is stored of activations.
        - Passes: none over activations, only arithmetic on kernels.
        - Inference: nothing is left of it, as w can be computed once.

    When to use:
        Where examples must not depend on one another and speed counts, e.g. in
        reinforcement learning or generative models, with `Bias` where a network asks
        for a normaliser. Expect to lower the learning rate. On ImageNet, ResNet-50 was
        less stable with it and some 6 % less accurate than with batch norm (Gitman and
        Ginsburg, 2017).

    Variables:
        Parameters ``kernel``, v, under ``layer_instance``, and
        ``layer_instance/kernel/scale``, g. Flax stores v at the length of g, so that
        the directions are all it takes from `kernel_init`.

    State:
        Hands on that of `Conv` with the kernel w.

    Args:
        features, kernel_size: as in `Conv`.
        scale_init: initialises g; sqrt(2) for ReLU networks without shortcuts.
        name: of the wrapper.
        **options: other attributes of `Conv`.

    Raises:
        ValueError: a `kernel_map`, which would undo g.
    """
    if options.get("kernel_map") is not None:
        raise ValueError(
            "weight normalisation sets the length of kernels itself; leave kernel_map"
            " out (the _ws or _wc at the end of a normaliser's name)."
        )
    # Without a parent the convolution becomes part of the wrapper.
    conv = Conv(features, kernel_size, parent=None, **options)
    return nn.WeightNorm(conv, scale_init=scale_init, name=name)


class Bias(Unfiltered, nn.Module):
    r"""Adds a bias per channel: what is left of batch norm after weight normalisation.

    $$
    y = x + \beta
    $$

    $\beta$ is ``bias``.

    Source:
        Salimans and Kingma, "Weight Normalization: A Simple Reparameterization to
        Accelerate Training of Deep Neural Networks" (NIPS 2016). There g of the kernel
        takes the place of the scale.

    Cost:
        - Parameters: C.
        - Statistics: none.
        - Passes: none for moments.
        - Inference: an addition.

    When to use:
        As the normaliser next to `weight_norm_conv`, or to see what a network does
        without normalisers.

    Variables:
        Parameter ``bias``, ``[C]``.

    State:
        Hands on what it is told, moved by the bias: exact.

    Attributes:
        use_running_average: accepted, so that networks can build any normaliser alike,
            and unused.
        dtype: as in `nn.BatchNorm`.
        param_dtype: as in `nn.BatchNorm`.
        bias_init: as in `nn.BatchNorm`.

    Raises:
        ValueError: a dtype that is not of floats; values that are complex.
    """

    use_running_average: bool | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self, x: Signal | jax.Array, use_running_average: bool | None = None
    ) -> Signal | jax.Array:
        """Adds the bias to ``[..., C]``; a Signal gives a Signal."""
        channels = self._masked(x, None)[0].shape[-1]
        bias = self.param("bias", self.bias_init, (channels,), self.param_dtype)

        def move_value(value: jax.Array) -> jax.Array:
            value, b = promote_dtype(value, bias, dtype=self.dtype)
            return value + b

        return through(x, move_value, lambda state: predict_affine(state, 1.0, bias))
