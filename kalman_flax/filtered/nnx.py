"""`filtered` of an NNX module: catches its normalisers in a copy of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from kalman_flax.filtered.linen import as_kalman_norm
from kalman_flax.filtered.marker import bind
from kalman_flax.layers.kalman_norm import KalmanNorm
from kalman_flax.layers.nnx import KalmanNorm as NnxKalmanNorm
from kalman_flax.layers.signal import Signal

#: attributes of `nnx.BatchNorm`
_OF_BATCH_NORM = (
    "axis", "momentum", "epsilon", "dtype", "param_dtype", "use_bias", "use_scale",
    "axis_name", "axis_index_groups",
)  # fmt: skip


def functional(
    model: nnx.Module, options: Mapping[str, Any], inference: bool
) -> Callable[..., Any]:
    """Returns ``fn(state, *args, **kwargs)``, in which the normalisers are caught; it
    gives what the model returns, and its new state.

    Args:
        model: of which `nnx.split` gives the state.
        options: of `KalmanNorm`, for every `nnx.BatchNorm`.
        inference: whether to catch them in inference, too.
    """
    graph = nnx.graphdef(model)

    @functools.wraps(type(model).__call__)
    def fn(state: Any, *args: Any, **kwargs: Any) -> Any:
        copy = nnx.merge(graph, state)
        caught = [
            (path, node)
            for path, node in nnx.iter_graph(copy)
            if type(node) in (nnx.BatchNorm, NnxKalmanNorm)
        ]
        for path, node in caught:
            name = "/".join(map(str, path))
            _change_class(node, _catching(type(node), name, options, inference))
        outputs = copy(*args, **kwargs)
        for _, node in caught:
            _change_class(node, type(node).__bases__[0])
        return outputs, nnx.state(copy)

    return fn


def _change_class(node: Any, cls: type) -> None:
    object.__setattr__(node, "__class__", cls)


def _catching(
    base: type, path: str, options: Mapping[str, Any], inference: bool
) -> type:
    def call(
        self: Any,
        x: Signal | jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Any:
        running = use_running_average
        if running is None:
            running = self.use_running_average
        unset = running is None  # of which the module itself complains
        if unset or (running and not inference) or isinstance(x, Signal):
            return base.__call__(self, x, running, mask=mask)
        norm, variables = _linen_form(self, options)
        norm = norm.clone(use_running_average=running)
        y, stats = bind(norm, path, variables, x, mask)
        for name, value in stats.items():
            getattr(self, name)[...] = value
        return y

    return type(base.__name__, (base,), {"__call__": call})


def _linen_form(
    node: Any, options: Mapping[str, Any]
) -> tuple[KalmanNorm, dict[str, dict[str, jax.Array]]]:
    if isinstance(node, NnxKalmanNorm):
        return node.linen.clone(), node.variables
    attributes = {name: getattr(node, name) for name in _OF_BATCH_NORM}
    params = {
        name: getattr(node, name)[...]
        for name in ("scale", "bias")
        if getattr(node, name) is not None
    }
    stats = {"mean": node.mean[...], "var": node.var[...]}
    norm = as_kalman_norm(attributes, options)
    return norm, {"params": params, "batch_stats": stats}
