"""Operations that hold a program of their own: jit, custom derivatives, remat, random
draws. Those that run it several times, or on several devices, are in `control`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr

from kalman_flax._filter.state import KalmanState
from kalman_flax.filtered.belief import Known, Lost, Operand, Root, coin, uniform
from kalman_flax.filtered.explain import Row
from kalman_flax.filtered.marker import Normalizer, kalman_norm_p
from kalman_flax.filtered.packing import kind_of, pack, unpack
from kalman_flax.filtered.source import in_library, place


class Interpreter(Protocol):
    """What the rules here need of `interpret.Interpreter`, which knows them."""

    rows: list[Row]

    def run(
        self, jaxpr: Jaxpr, consts: Sequence[Any], operands: Sequence[Operand]
    ) -> list[Operand]:
        """Evaluates a program."""
        ...

    def apart(self, fn: Callable[[], Any]) -> tuple[Any, list[Row]]:
        """Calls `fn`; returns the rows that it added beside what it returns."""
        ...

    def at(self, equation: Any) -> str:
        """Names an equation, and where it stands in the sources."""
        ...

    def called_at(self, site: str | None) -> AbstractContextManager[None]:
        """While the body of a library function is evaluated."""
        ...


def programs(equation: Any) -> Iterator[Jaxpr]:
    """The programs in the parameters of an equation."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def normalizers_in(equation: Any) -> list[Normalizer]:
    """The caught normalisers in the programs of an equation."""
    return [norm for inner in programs(equation) for norm in normalizers(inner)]


def normalizers(jaxpr: Jaxpr) -> list[Normalizer]:
    """The caught normalisers in a program, and in those inside of it."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive is kalman_norm_p:
            found.append(equation.params["norm"])
        found += normalizers_in(equation)
    return found


def bind(equation: Any, operands: Sequence[Operand]) -> list[Any]:
    """Returns the outputs of an equation as it is."""
    functions, params = (), equation.primitive.get_bind_params(equation.params)
    if isinstance(params, tuple):  # in some versions of JAX
        functions, params = params
    values = (x.value for x in operands)
    outputs = equation.primitive.bind(*functions, *values, **params)
    return list(outputs) if equation.primitive.multiple_results else [outputs]


# Random draws, by the name of the function that JAX compiles for each. They are
# independent of all else, so that dropout moves a state exactly.
def _bernoulli(p: jax.Array, *_: Any) -> Root:
    return coin(p)


def _uniform(low: jax.Array, high: jax.Array) -> Root:
    return uniform(low, high)


def _normal() -> Root:
    return Root(KalmanState(jnp.zeros(()), jnp.ones(())))


_DRAWS = {"_bernoulli": _bernoulli, "_uniform": _uniform, "_normal": _normal}


def draw(equation: Any, operands: Sequence[Operand]) -> Known | None:
    """What is known of a random draw, by parameters that are scalars."""
    make = _DRAWS.get(str(equation.params.get("name")))
    if make is None or equation.primitive.name not in ("jit", "pjit"):
        return None
    values = [x.value for x in operands[1:]]
    if any(np.ndim(value) for value in values):
        return None
    root = make(*values)
    return Known(root, None, lambda: root.state, None)


# Each rule gets the interpreter, the equation and its operands; returns its outputs.
Rule = Callable[[Interpreter, Any, list[Operand]], list[Operand]]


def _inline(interpreter: Interpreter, equation: Any, operands: Any) -> list[Operand]:
    """jit, closed_call: as if written out, so that pointwise functions stay whole."""
    inner = _program(equation)
    if equation.params.get("name") == "_resize" and in_library(inner.jaxpr):
        return _resize(equation, operands)
    operands = _constrain(operands, equation.params.get("in_shardings"))
    site = place(equation) if in_library(inner.jaxpr) else None
    with interpreter.called_at(site):
        outputs = interpreter.run(inner.jaxpr, inner.consts, operands)
    return _constrain(outputs, equation.params.get("out_shardings"))


def _resize(equation: Any, operands: Sequence[Operand]) -> list[Operand]:
    """`jax.image.resize`: weighs neighbours, taken as fully correlated, by weights that
    sum to 1, as `kalman_flax.filter.predict_average` does."""
    image, *_ = operands
    (output,) = bind(equation, operands)
    belief, axis = image.belief, getattr(image.belief, "axis", None)
    if isinstance(belief, Known):
        belief = belief.laid_out(axis)
        belief.through = (*belief.through, "resize")
    if axis is not None and output.shape[axis] != image.value.shape[axis]:
        belief = Lost(f"resize at {place(equation)}: of the channels")
    return [Operand(output, belief)]


def _program(equation: Any) -> ClosedJaxpr:
    inner = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())


def _constrain(operands: Sequence[Operand], shardings: Any) -> list[Operand]:
    """Keeps the shardings that a nested jit asks for."""
    return [
        dataclasses.replace(x, value=lax.with_sharding_constraint(x.value, sharding))
        if isinstance(sharding, jax.sharding.Sharding)
        else x
        for x, sharding in zip(operands, shardings or [None] * len(operands))
    ]


def _custom(interpreter: Interpreter, equation: Any, operands: Any) -> list[Operand]:
    """custom_jvp, custom_vjp: values by the function itself, which keeps its own
    derivative; states by what it computes."""
    outputs = _inline(interpreter, equation, operands)
    if normalizers_in(equation):
        return outputs
    values = bind(equation, operands)
    return [dataclasses.replace(x, value=value) for x, value in zip(outputs, values)]


def _remat(interpreter: Interpreter, equation: Any, operands: Any) -> list[Operand]:
    """Stays a remat: computed again in the backward pass, with the states."""
    params = equation.params
    kinds, made = [kind_of(x) for x in operands], []

    def body(arrays: Any) -> Any:
        given = unpack(arrays, kinds)
        outputs, rows = interpreter.apart(
            lambda: interpreter.run(params["jaxpr"], (), given)
        )
        made[:] = [[kind_of(x) for x in outputs], rows]
        return pack(outputs, made[0]), [row.report for row in rows]

    body = jax.checkpoint(
        body, prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    arrays, reports = body(pack(operands, kinds))
    out_kinds, rows = made
    interpreter.rows += [row.reporting(*r) for row, r in zip(rows, reports)]
    return unpack(arrays, out_kinds)


RULES: dict[str, Rule] = {
    "jit": _inline,
    "pjit": _inline,
    "closed_call": _inline,
    "core_closed_call": _inline,
    "core_call": _inline,
    "custom_jvp_call": _custom,
    "custom_vjp_call": _custom,
    "remat2": _remat,
    "remat": _remat,
    "checkpoint": _remat,
}
