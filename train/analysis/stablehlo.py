"""A trained network in forms that run without this project."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export

from kalman_flax import Conv, export_batch_norm, relu
from kalman_flax.baselines.flax_norms import BatchNorm
from kalman_flax.layers.linear import RNG
from train.data.batches import Standardize
from train.engine.classification import infer

PLATFORMS = ("cpu", "cuda", "tpu")


def serialize(
    network: nn.Module,
    variables: Any,
    standardize: Standardize,
    image_shape: tuple[int, ...],
) -> bytes:
    """Returns inference by moving statistics, weights and all, for `jax.export`.

    Args:
        network: maps standardised images to logits.
        variables: the network's collections.
        standardize: what to do to the images first.
        image_shape: ``[H, W, C]``.

    Returns:
        StableHLO for all `PLATFORMS`, of a function from ``[N, H, W, C]`` uint8 for any
        N to logits ``[N, num_classes]`` float32.
    """
    variables = jax.device_get(variables)

    def serve(images: jax.Array) -> jax.Array:
        return infer(network, variables, standardize(images))

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8)
    return export.export(jax.jit(serve), platforms=PLATFORMS)(images).serialize()


class Plain(NamedTuple):
    """The variables of a network of `nn.Conv`, `nn.Dense` and one of Flax's norms.

    Attributes:
        variables: float32 by path, ``"params/stem/kernel"``.
        norm: the norm, as one writes it.
    """

    variables: dict[str, np.ndarray]
    norm: str


def plain_variables(
    network: nn.Module, variables: Any, images: jax.Array
) -> Plain | None:
    """Returns the variables with which the same network in plain Flax infers the same.

    Kernels are stored as they are used, what only training needs is left out. That the
    logits are the same is not believed but tried, on `images`.

    Args:
        network: one of `kalman_flax.NETWORKS`.
        variables: its collections.
        images: standardised, ``[N, H, W, C]``.

    Returns:
        None where there are no such variables: in inference, the normaliser is neither
        Flax's batch norm nor its group norm.
    """
    network = network.clone(dtype=jnp.float32)  # else the logits differ by rounding
    plain = _in_flax(network)
    key = jax.random.key(0)
    needed = jax.eval_shape(lambda: plain.init(key, images, use_running_average=True))
    needed = traverse_util.flatten_dict(needed, sep="/")
    if not needed.keys() <= traverse_util.flatten_dict(variables, sep="/").keys():
        return None
    exported = export_batch_norm(
        network, variables, images, use_running_average=True, rngs={RNG: key}
    )
    flat = traverse_util.flatten_dict(exported, sep="/")
    flat = {path: np.asarray(flat[path]) for path in needed}
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(infer, static_argnums=0)
        expected = logits(network, variables, images)
        found = logits(plain, traverse_util.unflatten_dict(flat, sep="/"), images)
    if not np.allclose(found, expected, atol=1e-4 * np.abs(expected).max()):
        return None
    return Plain(flat, _written(plain.norm()))


def _in_flax(network: nn.Module) -> nn.Module:
    """`network` of layers that are Flax's own, but for the Signals."""
    norm, layer = network.norm, network.norm()
    if not isinstance(layer, (nn.BatchNorm, nn.GroupNorm)):
        norm = functools.partial(BatchNorm, epsilon=getattr(layer, "epsilon", 1e-5))
    return network.clone(norm=norm, conv=Conv, activation=relu)


def _written(norm: nn.BatchNorm | nn.GroupNorm) -> str:
    if isinstance(norm, nn.BatchNorm):
        return f"flax.linen.BatchNorm(epsilon={norm.epsilon})"
    return (
        f"flax.linen.GroupNorm(num_groups={norm.num_groups},"
        f" group_size={norm.group_size}, epsilon={norm.epsilon})"
    )
