"""Where a bad number comes from: the first layer that gives one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from train.data.batches import Split
from train.engine.experiment import Experiment
from train.engine.mesh import DEVICES, SAME, SPLIT
from train.engine.step import Draws, TrainState, draw, loss_of, replicas_of


def find_bad_number(
    experiment: Experiment, config: Any, state: TrainState, batch: Split
) -> str:
    """Says in words which layer is the first to give a NaN or an infinity in the update
    of `state` by `batch`: forward, else backward, else in the update itself."""
    layers: list[str] = []
    network = experiment.network.clone(remat=False)  # traces a layer twice

    def on_device(state: TrainState, batch: Split, draws: Draws) -> tuple[Any, Any]:
        layers.clear()
        learned = lax.pcast(state.learned, DEVICES, to="varying")
        with nn.intercept_methods(_watch(layers)):
            grads, (_, written) = jax.grad(loss_of, has_aux=True)(
                learned,
                network,
                experiment.standardize,
                config,
                state,
                batch,
                draws,
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

    over_devices = jax.shard_map(
        on_device,
        mesh=experiment.mesh,
        in_specs=(SAME, SPLIT, SPLIT),
        out_specs=SAME,
    )
    draws = draw(config, config.seed, state.step, replicas_of(config, experiment.mesh))
    forward, backward = jax.device_get(jax.jit(over_devices)(state, batch, draws))
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
