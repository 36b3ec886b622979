"""Scaled weight standardisation: what networks without normalisers are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from kalman_flax._filter.predict import predict_affine
from kalman_flax.layers.functions import relu
from kalman_flax.layers.linear import Conv, centre_kernel
from kalman_flax.layers.signal import SignalOrArray, through

#: 1 / standard deviation of max(z, 0) for z ~ N(0, 1)
_RELU_GAIN = math.sqrt(2.0 / (1.0 - 1.0 / math.pi))


class ScaledStandardization(nn.Module):
    r"""Standardises kernels so that a network needs no normaliser.

    $$
    W' = g \, \frac{W - \mathrm{mean}(W)}{\sqrt{\max(n \, \mathrm{var}(W), \epsilon)}}
    $$

    Mean and biased variance are of each output feature, over its $n = h w C$ weights.
    $g$ is the learned gain. Where the inputs are independent, all of one mean and of
    variance 1, the outputs have mean 0 and variance $g^2$. With `scaled_relu` between
    convolutions it stays 1 through a network, and nothing has to be normalised.

    Source:
        Brock, De and Smith, "Characterizing signal propagation to close the performance
        gap in unnormalized ResNets" (ICLR 2021). Epsilon is from
        deepmind-research/nfnets.

    Cost:
        - Parameters: one per feature.
        - Statistics: none.
        - Passes: none over activations, only arithmetic on kernels.
        - Inference: nothing is left of it, as the kernel can be computed once.

    When to use:
        As the `kernel_map` of a `scaled_weight_conv`.

    Variables:
        Parameter ``gain``, ``[features]``, which starts at 1: in a convolution
        ``kernel_map/gain`` beside the kernel.

    Attributes:
        epsilon: the least of n var.
        param_dtype: of the gain.
    """

    epsilon: float = 1e-4
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, kernel: jax.Array) -> jax.Array:
        """Maps a kernel ``[h, w, C, features]`` to the one to convolve with."""
        gain = self.param(
            "gain", nn.initializers.ones, kernel.shape[-1:], self.param_dtype
        )
        wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        centred = centre_kernel(wide)
        power = jnp.sum(jnp.square(centred), axis=(0, 1, 2))  # n var
        scale = gain * lax.rsqrt(jnp.maximum(power, self.epsilon))
        return (centred * scale).astype(kernel.dtype)


def scaled_weight_conv(
    features: int, kernel_size: Sequence[int], **options: Any
) -> Conv:
    """`Conv` whose kernel goes through `ScaledStandardization`.

    When to use:
        With `Bias` where a network asks for a normaliser, and `scaled_relu` for its
        activation. Best in `NFResNet`, which weighs its branches accordingly. In other
        residual networks each block adds its full variance to the stream.

    Args:
        features, kernel_size: as in `Conv`.
        **options: other attributes of `Conv`.

    Raises:
        ValueError: a `kernel_map`, whose place is taken.
    """
    if options.get("kernel_map") is not None:
        raise ValueError(
            "scaled weight standardisation sets the scale of kernels itself; leave"
            " kernel_map out (the _ws or _wc at the end of a normaliser's name)."
        )
    # A module each, without a parent: one passed to two convolutions would be shared.
    standardize = ScaledStandardization(parent=None)
    options["kernel_map"] = standardize
    return Conv(features, kernel_size, **options)


def scaled(x: SignalOrArray, factor: jax.Array | float) -> SignalOrArray:
    """`x` times a scalar, in the dtype of `x`."""
    return through(
        x,
        lambda value: value * jnp.asarray(factor, value.dtype),
        lambda state: predict_affine(state, factor, 0.0),
    )


def scaled_relu(x: SignalOrArray) -> SignalOrArray:
    """max(x, 0) sqrt(2 / (1 - 1 / pi)): of variance 1 for x ~ N(0, 1). The factor is
    1.7129; the authors' code has 1.7140, from samples."""
    return scaled(relu(x), _RELU_GAIN)
