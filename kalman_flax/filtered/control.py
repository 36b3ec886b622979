"""Control flow and `shard_map`: states pass along with the values where they keep their
form, and are lost, with the reason, where they do not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from kalman_flax._filter.state import KalmanState
from kalman_flax.filtered import nested
from kalman_flax.filtered.belief import Known, Lost, Operand
from kalman_flax.filtered.explain import Row
from kalman_flax.filtered.nested import Interpreter
from kalman_flax.filtered.operation import varying
from kalman_flax.filtered.packing import Kind, Of, kind_of, meet, pack, unpack

Body = Callable[[list[Kind], Any], list[Operand]]


def cond(interpreter: Interpreter, equation: Any, operands: Any) -> list[Operand]:
    """A state passes where every branch has one."""
    index, *given = operands
    branches = equation.params["branches"]
    kinds = [kind_of(x) for x in given]
    arrays = pack(given, kinds)

    def run(branch: Any, arrays: Any) -> list[Operand]:
        return interpreter.run(branch.jaxpr, branch.consts, unpack(arrays, kinds))

    out_kinds: list[Kind] = []
    rows: list[Row] = []
    for branch in branches:
        found, its_rows = _trial(interpreter, functools.partial(run, branch), arrays)
        rows += its_rows
        at = interpreter.at(equation)
        pairs = zip(out_kinds or found, found)
        out_kinds = [meet(*pair, at) for pair in pairs]
    interpreter.rows += rows
    if equation.params.get("branches_platforms"):  # its index has no value
        values = nested.bind(equation, operands)
        outputs, _ = interpreter.apart(lambda: run(branches[-1], arrays))
        return [Operand(v, x.belief) for v, x in zip(values, outputs)]

    def make(branch: Any) -> Callable[[Any], Any]:
        def body(arrays: Any) -> Any:
            outputs, _ = interpreter.apart(lambda: run(branch, arrays))
            return pack(outputs, out_kinds)

        return body

    return unpack(lax.switch(index.value, [*map(make, branches)], arrays), out_kinds)


def while_loop(interpreter: Interpreter, equation: Any, operands: Any) -> list[Operand]:
    """A state passes where the body gives one back of the same form."""
    params = equation.params
    split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    test, consts, init = (
        operands[: split[0]], operands[split[0] : split[1]], operands[split[1] :],
    )  # fmt: skip
    consts = _closed_over(consts)

    def body(kinds: list[Kind], arrays: Any) -> list[Operand]:
        inputs = [*consts, *unpack(arrays, kinds)]
        return interpreter.run(
            params["body_jaxpr"].jaxpr, params["body_jaxpr"].consts, inputs
        )

    kinds, rows = _fixed_point(interpreter, equation, body, init)
    interpreter.rows += rows
    goes_on = jax.extend.core.jaxpr_as_fun(params["cond_jaxpr"])

    def step(arrays: Any) -> Any:
        return pack(interpreter.apart(lambda: body(kinds, arrays))[0], kinds)

    arrays = lax.while_loop(
        lambda arrays: goes_on(*(x.value for x in test), *arrays[0])[0],
        step,
        pack(init, kinds),
    )
    return unpack(arrays, kinds)


def scan(interpreter: Interpreter, equation: Any, operands: Any) -> list[Operand]:
    """The same. States of what is stacked up are those of all the steps together."""
    params = equation.params
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    consts = _closed_over(operands[:first])
    init, xs = operands[first:last], operands[last:]
    x_kinds = [_slice(kind_of(x), interpreter.at(equation)) for x in xs]
    x_states = pack(xs, x_kinds)[1]

    def body(kinds: list[Kind], carry_and_slices: Any) -> list[Operand]:
        carry, slices = carry_and_slices
        inputs = [*consts, *unpack(carry, kinds), *unpack((slices, x_states), x_kinds)]
        return interpreter.run(params["jaxpr"].jaxpr, params["jaxpr"].consts, inputs)

    values = [x.value for x in xs]
    slices = jax.eval_shape(lambda: [value[0] for value in values])
    kinds, _ = _fixed_point(interpreter, equation, body, init, slices)
    made: list[Any] = []

    def step(carry: Any, slices: Any) -> Any:
        outputs, rows = interpreter.apart(lambda: body(kinds, (carry, slices)))
        ys = outputs[len(kinds) :]
        made[:] = [[kind_of(y) for y in ys], rows]
        reports = [row.report for row in rows]
        return pack(outputs[: len(kinds)], kinds), (pack(ys, made[0]), reports)

    carry, (ys, reports) = lax.scan(
        step,
        pack(init, kinds),
        values,
        params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    y_kinds, rows = made
    interpreter.rows += [row.reporting(*r) for row, r in zip(rows, reports)]
    states = [state and _of_all_steps(state) for state in ys[1]]
    stacked = unpack((ys[0], states), [_stack(kind) for kind in y_kinds])
    return [*unpack(carry, kinds), *stacked]


def _slice(kind: Kind, at: str) -> Kind:
    if not isinstance(kind, Of) or kind.axis is None:
        return kind
    if kind.axis == 0:
        return Lost(f"{at}: it runs over the channels")
    return kind._replace(axis=kind.axis - 1)


def _stack(kind: Kind) -> Kind:
    if not isinstance(kind, Of) or kind.axis is None:
        return kind
    return kind._replace(axis=kind.axis + 1)


def _of_all_steps(state: KalmanState) -> KalmanState:
    mean, var = state
    return KalmanState(jnp.mean(mean, 0), jnp.mean(var, 0) + jnp.var(mean, 0))


def _closed_over(operands: Sequence[Operand]) -> list[Operand]:
    """The same with states computed outside of the loop."""
    kinds = [kind_of(x) for x in operands]
    return unpack(pack(operands, kinds), kinds)


def _trial(
    interpreter: Interpreter, run: Callable[..., list[Operand]], *arrays: Any
) -> tuple[list[Kind], list[Row]]:
    """Kinds of the outputs, and rows without reports."""
    kinds: list[Kind] = []

    def body(*arrays: Any) -> None:
        kinds[:] = [kind_of(x) for x in run(*arrays)]

    _, rows = interpreter.apart(lambda: jax.eval_shape(body, *arrays))
    return kinds, [row.reporting() for row in rows]


def _fixed_point(
    interpreter: Interpreter,
    equation: Any,
    body: Body,
    init: Sequence[Operand],
    slices: Any = None,
) -> tuple[list[Kind], list[Row]]:
    """Which of the carries have a state that is there after each step."""
    kinds = [kind_of(x) for x in init]
    while True:
        arrays = pack(init, kinds)
        given = arrays if slices is None else (arrays, slices)
        run = functools.partial(body, kinds)
        found, rows = _trial(interpreter, run, given)
        at = interpreter.at(equation)
        met = [meet(*pair, at) for pair in zip(kinds, found)]
        if met == kinds:
            return kinds, rows
        kinds = met


def shard_map(interpreter: Interpreter, equation: Any, operands: Any) -> list[Operand]:
    """A state passes where it is the same on all devices."""
    params = equation.params
    kinds = [kind_of(x) for x in operands]
    arrays = pack(operands, kinds)
    specs = list(params["in_specs"]), _state_specs(params["in_specs"], kinds)
    mapped = functools.partial(
        jax.shard_map,
        mesh=params["mesh"],
        in_specs=(specs,),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )
    found: list[Kind] = []
    at = interpreter.at(equation)

    def run(arrays: Any) -> list[Operand]:
        return interpreter.run(params["jaxpr"], (), unpack(arrays, kinds))

    def trial(arrays: Any) -> list[Any]:
        outputs = run(arrays)
        found[:] = [_shared(x, params["check_vma"], at) for x in outputs]
        return [x.value for x in outputs]

    out_specs = list(params["out_specs"])
    _, rows = interpreter.apart(
        lambda: jax.eval_shape(mapped(trial, out_specs=out_specs), arrays)
    )
    interpreter.rows += [row.reporting() for row in rows]

    def body(arrays: Any) -> Any:
        return pack(interpreter.apart(lambda: run(arrays))[0], found)

    body = mapped(body, out_specs=(out_specs, _state_specs(out_specs, found)))
    return unpack(body(arrays), found)


def _state_specs(specs: Sequence[Any], kinds: Sequence[Kind]) -> list[Any]:
    """Of the states: split over the devices as their channels are."""

    def of(spec: PartitionSpec, axis: int | None) -> Any:
        split = axis is not None and axis < len(spec) and spec[axis]
        its = PartitionSpec(spec[axis]) if split else PartitionSpec()
        return KalmanState(its, its)

    return [
        of(spec, kind.axis) if isinstance(kind, Of) else None
        for spec, kind in zip(specs, kinds)
    ]


def _shared(operand: Operand, checked: bool, at: str) -> Kind:
    kind, belief = kind_of(operand), operand.belief
    if not isinstance(belief, Known):
        return kind
    state = belief.state
    if not checked or any(varying(jnp.asarray(stat)) for stat in state):
        return Lost(f"{at}: the state may differ between devices")
    return kind


nested.RULES |= {
    "cond": cond,
    "while": while_loop,
    "scan": scan,
    "shard_map": shard_map,
}
