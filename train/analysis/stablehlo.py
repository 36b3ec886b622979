"""A trained network in forms that run without this project."""

from __future__ import annotations

import functools
from collections.abc import Callable
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
from train.engine.classification import infer

PLATFORMS = ("cpu", "cuda", "tpu")


def serialize(serve: Callable[..., Any], *inputs: jax.ShapeDtypeStruct) -> bytearray:
    """Returns a function, weights and all, for `jax.export`.

    Args:
        serve: maps arrays ``[N, ...]`` to arrays, or to a dict of them.
        inputs: shapes and dtypes of its arguments, without the leading N.

    Returns:
        StableHLO for all `PLATFORMS`, and for any N.
    """
    (batch,) = export.symbolic_shape("batch")
    arguments = [jax.ShapeDtypeStruct((batch, *x.shape), x.dtype) for x in inputs]
    return export.export(jax.jit(serve), platforms=PLATFORMS)(*arguments).serialize()


class Plain(NamedTuple):
    """The variables of a network of `nn.Conv`, `nn.Dense` and one of Flax's norms.

    Attributes:
        variables: float32 by path, ``"params/stem/kernel"``.
        norm: the norm, as one writes it.
    """

    variables: dict[str, np.ndarray]
    norm: str


def plain_variables(
    network: nn.Module,
    variables: Any,
    inputs: Any,
    outputs: Callable[[nn.Module, Any, Any], Any] = infer,
) -> Plain | None:
    """Returns the variables with which the same network in plain Flax infers the same.

    Kernels are stored as they are used, what only training needs is left out. That the
    outputs are the same is not believed but tried, on `inputs`.

    Args:
        network: one of `kalman_flax.NETWORKS`, or of another task.
        variables: its collections.
        inputs: as it takes them.
        outputs: maps a network, its variables and `inputs` to what is compared.

    Returns:
        None where there are no such variables: in inference, the normaliser is neither
        Flax's batch norm nor its group norm.
    """
    network = network.clone(dtype=jnp.float32)  # else outputs differ by rounding
    plain = _in_flax(network)
    key = jax.random.key(0)
    needed = jax.eval_shape(lambda: plain.init(key, inputs, use_running_average=True))
    needed = traverse_util.flatten_dict(needed, sep="/")
    if not needed.keys() <= traverse_util.flatten_dict(variables, sep="/").keys():
        return None
    exported = export_batch_norm(
        network, variables, inputs, use_running_average=True, rngs={RNG: key}
    )
    flat = traverse_util.flatten_dict(exported, sep="/")
    flat = {path: np.asarray(flat[path]) for path in needed}
    with jax.default_matmul_precision("highest"):
        tried = jax.jit(outputs, static_argnums=0)
        expected = tried(network, variables, inputs)
        found = tried(plain, traverse_util.unflatten_dict(flat, sep="/"), inputs)
    if not jax.tree.all(jax.tree.map(_close, found, expected)):
        return None
    return Plain(flat, _written(plain.norm()))


def _close(found: jax.Array, expected: jax.Array) -> bool:
    return np.allclose(found, expected, atol=1e-4 * np.abs(expected).max())


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
