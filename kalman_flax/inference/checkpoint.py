"""Two promises: batch-norm checkpoints load, trained networks export to plain Flax."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from kalman_flax.inference.calibration import seed_calibration
from kalman_flax.layers.calibrated import NAMES
from kalman_flax.layers.linear import Convolution

Path = tuple[str, ...]

#: collection and name of what a KalmanNorm has and batch norm lacks
OF_FILTER = {
    ("params", "gain"),
    ("params", "noise"),
    ("batch_stats", "steps"),
    *(("batch_stats", name) for name in NAMES),
}


def load_batch_norm(
    variables: Any,
    batch_norm_variables: Any,
    network: nn.Module | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Loads a batch-norm network's variables into those of the same KN network.

    Layers correspond by name; Flax's automatic ``BatchNorm_3`` is ``KalmanNorm_3``.
    Only gain, process noise and a count of steps, which batch norm lacks, keep their
    values: fine-tuning a pre-trained model, as the paper does on COCO. Where layers
    have `KalmanNorm.calibrate`, it is started from the checkpoint's moving statistics,
    by `seed_calibration`, if the network is given; a warning says so if it is not.

    Args:
        variables: of the KN network, freshly initialised: ``params``, ``batch_stats``.
        batch_norm_variables: the checkpoint.
        network: the KN network, to check that no `Conv.kernel_map` of it changes what
            the checkpoint computes, and to seed. Leave it out where a change is meant.
        *args, **kwargs: an inference call of `network`, as in `export_batch_norm`.

    Returns:
        New variables with the structure of `variables`.

    Raises:
        ValueError: layers missing on either side, or of another shape, or with a
            kernel that the network's ``kernel_map`` changes; all are named.
    """
    ours: dict[Any, Any] = traverse_util.flatten_dict(variables)
    theirs: dict[Any, Any] = _renamed(traverse_util.flatten_dict(batch_norm_variables))
    of_filter = _of_filter(ours)
    kept = {path: leaf for path, leaf in ours.items() if path not in of_filter}
    wanted = _renamed({path: path for path in kept})
    problems = [(n, "missing in the checkpoint") for n in wanted if n not in theirs]
    problems += [(n, _unknown(n, theirs)) for n in theirs if n not in wanted]
    problems += [
        (
            n,
            f"shape {jnp.shape(theirs[n])} in the checkpoint,"
            f" {jnp.shape(ours[wanted[n]])} in the network",
        )
        for n in wanted
        if n in theirs and jnp.shape(theirs[n]) != jnp.shape(ours[wanted[n]])
    ]
    if problems:
        lines = (f"\n  {'/'.join(name)}: {text}" for name, text in problems)
        raise ValueError(f"the checkpoint does not fit:{''.join(lines)}")
    flat = ours | {path: theirs[name] for name, path in wanted.items()}
    loaded = traverse_util.unflatten_dict(flat)
    calibrates = any(path[-1] in NAMES for path in of_filter)
    if network is None:
        if calibrates:
            warnings.warn(
                "the network calibrates, and load_batch_norm can only start that from"
                " the checkpoint if it is given network and an inference call. Else"
                " start it by kalman_flax.seed_calibration or kalman_flax.calibrate.",
                stacklevel=2,
            )
        return loaded
    _check_kernels(network, loaded, *args, **kwargs)
    if not calibrates:
        return loaded
    options = {**kwargs, "mutable": ["batch_stats"]}
    forward = jax.jit(lambda variables: network.apply(variables, *args, **options))
    return seed_calibration(forward, loaded)


def _unknown(name: Path, checkpoint: dict[Path, Any]) -> str:
    if name in _of_filter(checkpoint):
        return (
            "of another filter's, unknown to the network: export_batch_norm leaves it"
            " out"
        )
    return "unknown to the network"


def _check_kernels(
    network: nn.Module, variables: Any, *args: Any, **kwargs: Any
) -> None:
    """Raises a ValueError where the network uses other kernels than `variables` has."""
    maps = _kernel_maps(network, variables, args, kwargs)
    flat: dict[Any, Any] = traverse_util.flatten_dict(variables)
    changed = [
        "/".join(path)
        for path, apply in maps.items()
        if not jnp.allclose(apply(flat[path]), flat[path], rtol=1e-3, atol=1e-6)
    ]
    if changed:
        lines = "".join(f"\n  {path}" for path in changed)
        raise ValueError(
            "the network's kernel_map changes kernels of the checkpoint, which was"
            " trained without it: it would compute something else, for the mean that"
            " centring takes away is not undone by the normaliser wherever the input of"
            " the kernel varies, as behind a ReLU. Load it into a network without"
            " kernel_map; or, where that is meant, leave the network out of this call."
            f"{lines}"
        )


def export_batch_norm(
    network: nn.Module, variables: Any, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Exports a trained network's variables to the same network in plain Flax.

    With them a network of `nn.Conv`, `nn.Dense` and `nn.BatchNorm` (same names, same
    epsilon) gives the same outputs by moving statistics: what is the filter's is
    gone, kernels are stored as they are used (`Conv.kernel_map`), and automatic names
    become ``BatchNorm_3``.

    Args:
        network: the module that `variables` belong to.
        variables: ``params`` and ``batch_stats``.
        *args, **kwargs: an inference call of `network`, e.g. ``images,
            use_running_average=True``; only shapes matter, nothing is computed.

    Returns:
        ``{"params": ..., "batch_stats": ...}``.
    """
    kernel_maps = _kernel_maps(network, variables, args, kwargs)
    flat: dict[Any, Any] = traverse_util.flatten_dict(variables)
    of_filter = _of_filter(flat)
    exported = {
        path: kernel_maps.get(path, lambda kernel: kernel)(leaf)
        for path, leaf in flat.items()
        if path not in of_filter
    }
    return traverse_util.unflatten_dict(_renamed(exported))


def _kernel_maps(
    network: nn.Module, variables: Any, args: Any, kwargs: Any
) -> dict[Path, Callable[[jax.Array], jax.Array]]:
    """The maps of the kernels that a call of `network` convolves with, by path."""
    kernel_maps = {}

    def note(call, call_args, call_kwargs, context):
        module = context.module
        if isinstance(module, Convolution) and module.kernel_map:
            path = ("params", *module.path, "kernel")
            kernel_maps[path] = module.clone(parent=None).map_kernel
        return call(*call_args, **call_kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda v: network.apply(v, *args, **kwargs), variables)
    return kernel_maps


def _of_filter(flat: dict[Path, Any]) -> set[Path]:
    """Paths of `OF_FILTER`, in layers that keep running statistics."""
    return {
        (collection, *layer, name)
        for collection, *layer, name in flat
        if (collection, name) in OF_FILTER and ("batch_stats", *layer, "mean") in flat
    }


def _renamed(flat: dict[Path, Any]) -> dict[Path, Any]:
    """Gives automatically named KalmanNorm layers the name of a BatchNorm."""
    result: dict[Path, Any] = {}
    for path, leaf in flat.items():
        name = tuple(re.sub(r"^KalmanNorm_(\d+)$", r"BatchNorm_\1", p) for p in path)
        if name in result:
            raise ValueError(
                f"{'/'.join(path)} would become {'/'.join(name)}, which there is"
                " already: BatchNorm and KalmanNorm layers with automatic names are"
                " mixed. Give them names of your own."
            )
        result[name] = leaf
    return result
