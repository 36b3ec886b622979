"""Where a bad number comes from: the first layer that gives one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from train.engine.experiment import Experiment
from train.engine.mesh import DEVICES, over_devices
from train.engine.step import (
    Draws,
    TrainState,
    draw,
    gradient_of,
    replicas_of,
    varying,
)


def find_bad_number(
    experiment: Experiment, config: Any, state: TrainState, batch: Any
) -> str:
    """Says in words which layer is the first to give a NaN or an infinity in the update
    of `state` by `batch`: forward, else backward, else in the update itself."""
    layers: list[str] = []
    task, mesh = experiment.task, experiment.mesh
    network = task.network.clone(remat=False)  # traces a layer twice

    def on_device(state: TrainState, batch: Any, draws: Draws) -> tuple[Any, Any]:
        layers.clear()
        with nn.intercept_methods(_watch(layers)):
            grads, (_, written) = gradient_of(
                task,
                config,
                state,
                varying(state.learned),
                batch,
                draws,
                network=network,
                mutable=("batch_stats", "intermediates"),
            )
        flags = {
            path[-1]: flag
            for path, flag in traverse_util.flatten_dict(
                written["intermediates"]
            ).items()
            if path[-1].startswith(_FLAG)
        }
        forward = [
            jnp.sum(jnp.asarray(flags[_FLAG + str(i)])) for i in range(len(layers))
        ]
        backward = jax.tree.map(lambda g: jnp.sum(~jnp.isfinite(g)), grads["params"])
        return lax.psum((forward, backward), DEVICES)

    draws = draw(task, experiment.key, state.step, replicas_of(config, mesh))
    count = jax.jit(over_devices(on_device, mesh))
    forward, backward = jax.device_get(count(state, batch, draws))
    for layer, bad in zip(layers, forward):
        if bad:
            return f"{layer} is the first layer whose output is not finite"
    modules = [layer.split(".")[0] for layer in layers]
    bad = {
        "/".join(path[:-1])
        for path, count in traverse_util.flatten_dict(backward).items()
        if count
    }
    if bad:
        last = max(bad, key=lambda path: modules.index(path) if path in modules else 0)
        return (
            f"all outputs are finite; {last} is the first layer, from the loss back,"
            " whose gradient is not"
        )
    return "all outputs and gradients are finite; the update itself overflowed"


_FLAG = "not_finite_"


def _watch(layers: list[str]) -> Callable[..., Any]:
    """Interceptor that appends the name of every call that returns, and counts the bad
    numbers in what it returns, in ``intermediates``."""

    def intercept(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        method = context.method_name
        if method != "__call__" and method.startswith("_"):
            return out
        values = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x, jnp.inexact)]
        bad = sum(jnp.sum(~jnp.isfinite(x)) for x in values)
        path = "/".join(context.module.path) or type(context.module).__name__
        context.module.sow("intermediates", _FLAG + str(len(layers)), bad)
        layers.append(path if method == "__call__" else f"{path}.{method}")
        return out

    return intercept
