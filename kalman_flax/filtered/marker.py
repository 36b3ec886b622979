"""The primitive that stands for a normaliser in the trace of a model."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from kalman_flax._filter.state import KalmanState
from kalman_flax.layers.kalman_norm import KalmanNorm
from kalman_flax.layers.signal import Signal

#: set while a normaliser is applied that is not to be caught again
_applying = contextvars.ContextVar("applying", default=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Normalizer:
    """A normaliser that was caught.

    Attributes:
        module: unbound, with all its options.
        path: of the module in the model.
        variables: the structure of its variables, with a mask or None beside them.
        names: of the statistics that it returns.
    """

    module: KalmanNorm
    path: str
    variables: Any
    names: tuple[str, ...]

    def apply(
        self, x: jax.Array, state: KalmanState | None, *leaves: jax.Array
    ) -> tuple[jax.Array, list[jax.Array], KalmanState]:
        """Returns the output, the new statistics, and the state that is handed on."""
        variables, mask = jax.tree.unflatten(self.variables, leaves)
        token = _applying.set(True)
        try:
            outputs: Any = self.module.apply(
                variables, Signal(x, state), mask=mask, mutable=["batch_stats"]
            )
            y, updates = outputs
        finally:
            _applying.reset(token)
        stats = updates.get("batch_stats", {})
        return y.value, [stats[name] for name in self.names], y.state

    def plain(self, x: jax.Array, *leaves: jax.Array) -> list[jax.Array]:
        """Returns output and statistics where no state is known."""
        y, stats, _ = self.apply(x, None, *leaves)
        return [y, *stats]

    def hands_on_the_same(self, batch: Sequence[tuple[Any, tuple[bool, ...]]]) -> bool:
        """Whether what it hands on is the same for all examples of the vmaps of
        `batch`: it follows from the parameters."""
        learned = (
            jax.tree.unflatten(self.variables, flags)[0]["params"] for _, flags in batch
        )
        of_parameters = self.module.propagate == "normalized"
        return of_parameters and not any(map(any, map(jax.tree.leaves, learned)))

    def gain(self, x: jax.Array, *leaves: jax.Array) -> jax.Array | float:
        """Returns q."""
        variables, _ = jax.tree.unflatten(self.variables, leaves)
        parameters, _ = self.module.bind(variables)._variables(x)
        return parameters.gain


def applying() -> bool:
    """Whether a normaliser is being applied by `Normalizer.apply`."""
    return _applying.get()


#: operands: x, then the leaves of variables and mask. `batch` has, for each `jax.vmap`
#: around it, the outermost first, its axis name and which leaves have its axis in
#: front; x always has.
kalman_norm_p = Primitive("kalman_norm")
kalman_norm_p.multiple_results = True


def bind(
    norm: KalmanNorm, path: str, variables: Any, x: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Puts the marker in the trace: returns output and new statistics.

    Args:
        norm: unbound, with ``use_running_average`` set.
        path: of the normaliser in the model.
        variables: its ``params`` and ``batch_stats``; statistics that are missing start
            as they do in `nn.BatchNorm`.
        x, mask: as in `KalmanNorm`.
    """
    x = jnp.asarray(x)
    shape = (x.shape[norm.axis],)
    start = {"mean": jnp.zeros(shape, jnp.float32), "var": jnp.ones(shape, jnp.float32)}
    start |= norm.own_statistics(*shape)
    stats = {**start, **variables.get("batch_stats", {})}
    variables = {"params": variables.get("params", {}), "batch_stats": stats}
    leaves, structure = jax.tree.flatten((variables, mask))
    moved = () if norm.use_running_average else tuple(sorted(stats))
    caught = Normalizer(norm, path, structure, moved)
    y, *new = kalman_norm_p.bind(x, *leaves, norm=caught, batch=())
    return y, dict(zip(moved, new))


def mapped(
    fn: Any, batch: Sequence[tuple[Any, tuple[bool, ...]]], out_axes: Any
) -> Any:
    """Returns ``fn(x, *leaves)`` under the vmaps of `batch`."""
    for axis_name, flags in reversed(batch):
        in_axes = (0, *(0 if flag else None for flag in flags))
        fn = jax.vmap(fn, in_axes, out_axes, axis_name=axis_name)
    return fn


def _plain(*operands: jax.Array, norm: Normalizer, batch: Any) -> list[jax.Array]:
    return mapped(norm.plain, batch, 0)(*operands)


def _shapes(*avals: Any, norm: Normalizer, batch: Any) -> list[Any]:
    def fill(*arrays: jax.Array) -> list[jax.Array]:
        return _plain(*arrays, norm=norm, batch=batch)

    # Unlike `jax.eval_shape`, keeps over which devices of a `shard_map` these vary.
    return jax.make_jaxpr(fill)(*avals).out_avals


def _batch(axis_data: Any, operands: Any, dims: Any, *, norm: Any, batch: Any) -> Any:
    size = axis_data.size
    flags = tuple(d is not None for d in dims)
    x, *leaves = (
        jnp.moveaxis(operand, d, 0) if flag else operand
        for operand, d, flag in zip(operands, dims, flags)
    )
    if not flags[0]:
        x = jnp.broadcast_to(x, (size, *x.shape))
    name = getattr(axis_data, "name", None)
    name = name if isinstance(name, str) else None
    outs = kalman_norm_p.bind(x, *leaves, norm=norm, batch=((name, flags[1:]), *batch))
    return outs, [0] * len(outs)


def _no_gradient(*_: Any, **__: Any) -> Any:
    raise ValueError(
        "a gradient is taken inside of a function given to kalman_flax.filtered. Give"
        " it the forward pass alone, and take the gradient of what it returns."
    )


kalman_norm_p.def_abstract_eval(_shapes)
kalman_norm_p.def_impl(jax.jit(_plain, static_argnames=("norm", "batch")))
mlir.register_lowering(kalman_norm_p, mlir.lower_fun(_plain, multiple_results=True))
batching.fancy_primitive_batchers[kalman_norm_p] = _batch
ad.primitive_jvps[kalman_norm_p] = _no_gradient
