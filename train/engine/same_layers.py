"""Whether the layers of a checkpoint compute the same here: not believed but tried."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from configs import schema
from kalman_flax import Conv
from kalman_flax.layers.linear import RNG
from kalman_flax.layers.signal import as_signal
from kalman_flax.registry import KERNEL_MAPS
from train.engine.checkpoint import Checkpoint, Path
from train.engine.normalizer import make_normalization

_CHANNELS = 16


def training_only(
    checkpoint: Checkpoint, config: Any, ours: dict[Path, Any]
) -> set[tuple[str, str]]:
    """Returns collection and name of what only one of two normalisers has, as it needs
    it in training.

    Args:
        checkpoint: what there is to start from.
        config: of the run that is to start from it.
        ours: the run's own variables, by path.

    Raises:
        ValueError: from the same variables, the run's layers infer something else.
    """
    if _same_names(checkpoint.config, config):
        return set()
    layers = make_normalization(config)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 4, _CHANNELS)).astype(np.float32)
    theirs = checkpoint.layers.norm(use_running_average=True)
    norm = layers.norm(use_running_average=True)
    values = {
        path: rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        for path, leaf in _initial(theirs, x).items()
    }
    y = checkpoint.layers.activation(as_signal(_apply(theirs, values, x)))
    own = _initial(norm, x)
    shared = own | {p: v for p, v in values.items() if p in own}
    z = layers.activation(as_signal(_apply(norm, shared, x)))
    if not _close(y.value, z.value):
        raise ValueError(
            f"init_from, {checkpoint.name}, was trained with norm {checkpoint.norm!r},"
            f" and {config.norm!r} infers otherwise: what both call scale and bias is"
            " not the same in each. Start from a network that was trained with"
            f" {config.norm!r}, or choose a norm that infers as that one."
        )
    _check_kernels(checkpoint, config, layers.conv, ours)
    return {(path[0], path[-1]) for path in own.keys() ^ values.keys()}


def _same_names(theirs: Any, ours: Any) -> bool:
    """Whether two configs have the same normaliser, options included."""
    keys = ("norm", "norm_options", "plugins")
    return theirs is not None and all(
        schema.plain(theirs[key]) == schema.plain(ours[key]) for key in keys
    )


def _check_kernels(
    checkpoint: Checkpoint, config: Any, conv: Any, ours: dict[Path, Any]
) -> None:
    """Convolves by the largest kernel that both have."""
    kernels = [
        path
        for path, leaf in checkpoint.variables.items()
        if path[-1] == "kernel"
        and np.ndim(leaf) == 4
        and path in ours
        and np.shape(ours[path]) == np.shape(leaf)
    ]
    if not kernels:
        return
    path = max(kernels, key=lambda path: np.size(checkpoint.variables[path]))
    layer = {
        (p[0], *p[len(path) - 1 :]): np.asarray(leaf)
        for p, leaf in checkpoint.variables.items()
        if p[:-1] == path[:-1]
    }
    height, width, channels, features = np.shape(checkpoint.variables[path])
    x = np.random.default_rng(0).normal(size=(2, 8, 8, channels)).astype(np.float32)

    def output(make: Any) -> Any:
        bias = ("params", "bias") in layer
        module = make(features, (height, width), use_bias=bias)
        own = _initial(module, x)
        own |= {p: leaf for p, leaf in layer.items() if p in own}
        return as_signal(_apply(module, own, x)).value

    if not _close(output(checkpoint.layers.conv), output(conv)):
        raise ValueError(
            f"init_from, {checkpoint.name}, was trained with norm {checkpoint.norm!r},"
            f" and {config.norm!r} treats kernels otherwise: one of the two centres,"
            " standardises or scales them. Behind a ReLU that makes another function of"
            " what was trained. Choose a norm that takes the kernels as that one does,"
            f" such as {_suggested(checkpoint, config)!r}."
        )


def _suggested(checkpoint: Checkpoint, config: Any) -> str:
    """The run's norm, with the end of the other's name."""
    stem = config.norm
    for end in KERNEL_MAPS:
        stem = stem.removesuffix(end)
    if checkpoint.layers.conv is Conv:  # as they are, whatever the name says
        return stem
    ends = (end for end in KERNEL_MAPS if checkpoint.norm.endswith(end))
    return stem + next(ends, "")


def _initial(module: nn.Module, x: np.ndarray) -> dict[Path, jax.Array]:
    key = jax.random.key(0)
    variables: Any = module.init({"params": key, RNG: key}, x)
    flat: Any = traverse_util.flatten_dict(variables)
    return flat


def _apply(module: nn.Module, flat: dict[Path, Any], x: np.ndarray) -> Any:
    return module.apply(
        traverse_util.unflatten_dict(flat), x, rngs={RNG: jax.random.key(0)}
    )


def _close(a: jax.Array, b: jax.Array) -> bool:
    return bool(jnp.allclose(a, b, rtol=0, atol=1e-3 * jnp.abs(a).max()))
