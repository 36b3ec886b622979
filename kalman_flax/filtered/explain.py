"""Which normalisers get a prediction, through what, and what loses it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kalman_flax._filter.observe import observe
from kalman_flax._filter.state import KalmanState, for_channels
from kalman_flax.layers.kalman_norm import KalmanNorm
from kalman_flax.layers.signal import Signal


@dataclasses.dataclass(frozen=True)
class Row:
    """One normaliser.

    Attributes:
        path: of the module, e.g. ``"stage1/norm2"``.
        predicted: whether it gets a prediction.
        through: the operations that the state came through since the last normaliser.
        lost_at: the operation that lost the state, with file and line, or what else is
            in the way; None where the normaliser is predicted.
        gain: q; an array where it is learned for each channel.
        log_ratio: log of predicted over observed variance, the mean over the channels;
            None where no states were at hand.
    """

    path: str
    predicted: bool
    through: tuple[str, ...] = ()
    lost_at: str | None = None
    gain: Any = None
    log_ratio: Any = None

    @property
    def report(self) -> tuple[Any, Any]:
        """Gain and log-ratio, as a pytree of arrays."""
        return self.gain, self.log_ratio

    def reporting(self, gain: Any = None, log_ratio: Any = None) -> Row:
        """The same row with another report."""
        return dataclasses.replace(self, gain=gain, log_ratio=log_ratio)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found: a table when printed.

    Attributes:
        rows: one for each call of a normaliser in training, in their order.
    """

    rows: tuple[Row, ...]

    @property
    def predicted(self) -> int:
        """How many normalisers are predicted."""
        return sum(row.predicted for row in self.rows)

    def __str__(self) -> str:
        head = ("normaliser", "predicted", "gain", "log ratio", "through, or lost at")
        cells = [head, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
            for row in cells
        ]
        total = f"{self.predicted} of {len(self.rows)} normalisers predicted"
        return "\n".join([*lines, total])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.path or "(the model itself)",
        "yes" if row.predicted else "no",
        _number(row.gain),
        _number(row.log_ratio),
        ", ".join(row.through) if row.predicted else row.lost_at or "",
    )


def _number(value: Any) -> str:
    return "-" if value is None else f"{float(np.mean(value)):.3g}"


def report(
    module: KalmanNorm,
    x: jax.Array,
    state: KalmanState | None,
    axis: int,
    gain: Any,
) -> dict[str, Any]:
    """The last two fields of a `Row`, of normaliser `module` on `x`."""
    if gain is None and module.learn_gain is None:
        gain = module.gain
    if state is None:
        return {"gain": gain, "log_ratio": None}
    observed = observe(x, axis=axis).var
    ratio = (state.var + module.epsilon) / (observed + module.epsilon)
    return {"gain": gain, "log_ratio": jnp.mean(jnp.log(ratio))}


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Runs a training step's forward pass, and says what every normaliser got:

        print(kf.explain(apply, variables, images, train=True, mutable=["batch_stats"]))

    Args:
        fn: what `kalman_flax.filtered` returned, also under `jax.jit`; or the ``apply``
            of a network of Signals.
        *args, **kwargs: what to call it with. Where some are shapes
            (`jax.ShapeDtypeStruct`), nothing is computed, and rows have no log-ratio.

    Returns:
        An `Explanation`, to be printed, or read by its ``rows``.
    """
    inner = fn
    while inner is not None:
        if hasattr(inner, "explain_call"):
            return Explanation(tuple(inner.explain_call(args, kwargs)))
        inner = getattr(inner, "__wrapped__", None)
    return Explanation(tuple(_of_signals(fn, args, kwargs)))


def _of_signals(fn: Callable[..., Any], args: Any, kwargs: Any) -> Sequence[Row]:
    rows: list[Row] = []

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if (
            isinstance(module, KalmanNorm)
            and context.method_name == "filter"
            and not module.is_initializing()
        ):
            rows.extend(_row(module, *args, **kwargs))
        return call(*args, **kwargs)

    leaves, structure = jax.tree.flatten((args, kwargs))
    shapes = [leaf for leaf in leaves if _is_shape(leaf)]

    def run(*values: jax.Array) -> None:
        given = iter(values)
        filled = [next(given) if _is_shape(leaf) else leaf for leaf in leaves]
        args, kwargs = jax.tree.unflatten(structure, filled)
        with nn.intercept_methods(watch):
            fn(*args, **kwargs)

    if shapes:
        jax.eval_shape(run, *shapes)
    else:
        run()
    return rows


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _row(
    module: KalmanNorm,
    x: Signal | jax.Array,
    use_running_average: bool | None = None,
    **_: Any,
) -> list[Row]:
    if nn.merge_param(
        "use_running_average", module.use_running_average, use_running_average
    ):
        return []
    state = lost_at = None
    if not isinstance(x, Signal):
        lost_at = "a plain array came in: give a kf.Signal, or use kf.filtered"
    elif x.state is None:
        lost_at = "a Signal came in whose state is unknown"
    else:
        state = for_channels(x.state, x.value.shape[module.axis])
    value = x.value if isinstance(x, Signal) else x
    facts = report(module, value, state, module.axis, _gain(module))
    facts = {k: None if isinstance(v, Tracer) else v for k, v in facts.items()}
    return [Row("/".join(module.path), state is not None, (), lost_at, **facts)]


def _gain(module: KalmanNorm) -> Any:
    if module.learn_gain is None:
        return module.gain
    return jax.nn.sigmoid(module.get_variable("params", "gain"))
