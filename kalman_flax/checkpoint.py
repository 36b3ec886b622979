"""Two promises: batch-norm checkpoints load, trained networks export to plain Flax."""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from kalman_flax.layers.linear import Conv, standardize_kernel

_FILTER_PARAMS = ("gain", "noise")


def load_batch_norm(variables: Any, batch_norm_variables: Any) -> Any:
    """Loads a batch-norm network's variables into those of the same KN network.

    Layers correspond by name; Flax's automatic ``BatchNorm_3`` is ``KalmanNorm_3``.
    Only gain and process noise, which batch norm lacks, keep their values: fine-tuning
    a pre-trained model, as the paper does on COCO.

    Args:
        variables: of the KN network, freshly initialised: ``params``, ``batch_stats``.
        batch_norm_variables: the checkpoint.

    Returns:
        New variables with the structure of `variables`.

    Raises:
        ValueError: layers missing on either side, or of another shape; all are named.
    """
    ours = traverse_util.flatten_dict(variables, sep="/")
    theirs = _flatten(batch_norm_variables)
    names = {path: _batch_norm_path(path) for path in ours}
    learned = {path for path in ours if path.split("/")[-1] in _FILTER_PARAMS}
    wanted = {names[path]: path for path in ours if path not in learned}
    problems = [f"missing in the checkpoint: {n}" for n in wanted if n not in theirs]
    problems += [f"unknown to the network: {n}" for n in theirs if n not in wanted]
    problems += [
        f"{n}: shape {jnp.shape(theirs[n])} in the checkpoint,"
        f" {jnp.shape(ours[wanted[n]])} in the network"
        for n in wanted
        if n in theirs and jnp.shape(theirs[n]) != jnp.shape(ours[wanted[n]])
    ]
    if problems:
        raise ValueError("the checkpoint does not fit:\n  " + "\n  ".join(problems))
    loaded = {p: ours[p] if p in learned else theirs[names[p]] for p in ours}
    return traverse_util.unflatten_dict(loaded, sep="/")


def export_batch_norm(network: nn.Module, variables: Any, *args: Any, **kwargs: Any):
    """Exports a trained network's variables to the same network in plain Flax.

    With them a network of `nn.Conv`, `nn.Dense` and `nn.BatchNorm` (same names, same
    epsilon) gives the same outputs by moving statistics: gain and process noise are
    gone, standardised kernels are stored as they are used, and automatic names become
    ``BatchNorm_3``.

    Args:
        network: the module that `variables` belong to.
        variables: ``params`` and ``batch_stats``.
        *args, **kwargs: an inference call of `network`, e.g. ``images,
            use_running_average=True``; only shapes matter, nothing is computed.

    Returns:
        ``{"params": ..., "batch_stats": ...}``.
    """
    standardized = set()

    def note(call, call_args, call_kwargs, context):
        if isinstance(context.module, Conv) and context.module.weight_standardization:
            standardized.add("/".join(("params", *context.module.path, "kernel")))
        return call(*call_args, **call_kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(lambda v: network.apply(v, *args, **kwargs), variables)
    flat = traverse_util.flatten_dict(variables, sep="/")
    exported = {
        path: standardize_kernel(leaf) if path in standardized else leaf
        for path, leaf in flat.items()
        if path.split("/")[-1] not in _FILTER_PARAMS
    }
    return traverse_util.unflatten_dict(_flatten_renamed(exported), sep="/")


def _flatten(variables: Any) -> dict[str, Any]:
    return _flatten_renamed(traverse_util.flatten_dict(variables, sep="/"))


def _flatten_renamed(flat: dict[str, Any]) -> dict[str, Any]:
    renamed = {_batch_norm_path(path): leaf for path, leaf in flat.items()}
    if len(renamed) != len(flat):
        raise ValueError(
            "the network mixes automatically named BatchNorm and KalmanNorm layers,"
            " which would share a name; give them names of your own."
        )
    return renamed


def _batch_norm_path(path: str) -> str:
    return re.sub(r"(^|/)KalmanNorm_(\d+)(?=/)", r"\1BatchNorm_\2", path)
