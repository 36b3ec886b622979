"""Evaluates a traced program with what is believed beside each of its values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import Jaxpr, Literal

from kalman_flax._filter.state import KalmanState
from kalman_flax.filtered import control as control  # adds its rules to `nested.RULES`
from kalman_flax.filtered import nested
from kalman_flax.filtered.belief import Belief, Known, Lost, Operand
from kalman_flax.filtered.explain import Row, report
from kalman_flax.filtered.kernels import KernelMap, map_kernel
from kalman_flax.filtered.marker import Normalizer, kalman_norm_p, mapped
from kalman_flax.filtered.operation import (
    Operation,
    Unknown,
    broadcast_small,
    vary_alike,
)
from kalman_flax.filtered.rules import ELEMENTWISE, QUIET, RULES, SHORT
from kalman_flax.filtered.source import place


@dataclasses.dataclass
class Interpreter:
    """One evaluation of a program.

    Attributes:
        strict: raise where a normaliser gets no prediction.
        explain: compute what the rows report.
        kernel_map: what kernels of convolutions go through.
        convolutions: the equations that this is for, by their ids.
        rows: one for each normaliser that was met.
    """

    strict: bool = False
    explain: bool = False
    kernel_map: KernelMap | None = None
    convolutions: frozenset[int] = frozenset()
    rows: list[Row] = dataclasses.field(default_factory=list)
    _site: str | None = None  # of the call of the library function evaluated now

    def run(
        self, jaxpr: Jaxpr, consts: Sequence[Any], operands: Sequence[Operand]
    ) -> list[Operand]:
        """Returns the outputs of `jaxpr`."""
        operand_of = dict(zip(jaxpr.constvars, map(Operand, consts)))
        operand_of |= dict(zip(jaxpr.invars, operands))

        def read(atom: Any) -> Operand:
            return Operand(atom.val) if isinstance(atom, Literal) else operand_of[atom]

        for equation in jaxpr.eqns:
            info = equation.source_info
            names = source_info_util.current_name_stack() + info.name_stack
            with (
                source_info_util.user_context(info.traceback, name_stack=names),
                equation.ctx.manager,
            ):
                outputs = self._equation(equation, [read(x) for x in equation.invars])
            operand_of.update(zip(equation.outvars, outputs))
        return [read(x) for x in jaxpr.outvars]

    def at(self, equation: Any) -> str:
        """Names an equation, and where it stands in the sources."""
        name = equation.primitive.name
        return f"{SHORT.get(name, name)} at {self._site or place(equation)}"

    @contextmanager
    def called_at(self, site: str | None) -> Iterator[None]:
        """While the body of a library function is evaluated that was called there."""
        before, self._site = self._site, self._site or site
        try:
            yield
        finally:
            self._site = before

    def apart(self, fn: Callable[[], Any]) -> tuple[Any, list[Row]]:
        """Returns what `fn` returns, and the rows that it added, taken off again."""
        before, self.rows = self.rows, []
        try:
            return fn(), self.rows
        finally:
            self.rows = before

    def _equation(self, equation: Any, operands: list[Operand]) -> list[Operand]:
        if equation.primitive is kalman_norm_p:
            return self._normalizer(equation, operands)
        if drawn := nested.draw(equation, operands):
            (value,) = nested.bind(equation, operands)
            return [Operand(value, drawn)]
        constant = all(x.belief is None for x in operands)
        rule = nested.RULES.get(equation.primitive.name)
        if rule and not (constant and self._is_plain(equation)):
            return rule(self, equation, operands)
        is_mapped = id(equation) in self.convolutions and operands[1].belief is None
        if is_mapped and self.kernel_map:
            spec = equation.params["dimension_numbers"].rhs_spec
            kernel = map_kernel(self.kernel_map, operands[1].value, spec)
            operands = [operands[0], Operand(kernel)]
        if constant and (literal := _literal(equation, operands)):
            return [literal]
        outputs = nested.bind(equation, operands)
        self._refuse(equation)
        beliefs: Sequence[Belief] = [None] * len(outputs)
        if not constant:
            beliefs = self._believe(equation, operands, outputs)
        small = _compact(equation, operands, outputs)
        return [Operand(*both, small) for both in zip(outputs, beliefs)]

    def _is_plain(self, equation: Any) -> bool:
        """Whether there is nothing to do inside of an equation."""
        return not (self.convolutions or nested.normalizers_in(equation))

    def _believe(
        self, equation: Any, operands: list[Operand], outputs: list[jax.Array]
    ) -> Sequence[Belief]:
        """What is believed of the outputs, by the table of rules."""
        name: str = equation.primitive.name
        at = self.at(equation)
        lost = [x.belief for x in operands if isinstance(x.belief, Lost)]
        entry = RULES.get(name)
        if lost and not (entry and entry.takes_lost):
            return [lost[0]] * len(outputs)
        if not entry:
            return [Lost(f"{at}: it has no rule")] * len(outputs)
        operation = Operation(equation.primitive, equation.params, operands, outputs)
        try:
            beliefs = entry.rule(operation)
        except Unknown as reason:
            return [lost[0] if lost else Lost(f"{at}: {reason}")] * len(outputs)
        if beliefs is None or isinstance(beliefs, (Known, Lost)):
            beliefs = [beliefs]
        for belief in beliefs:
            if isinstance(belief, Known) and name not in QUIET:
                belief.through = (*belief.through, SHORT.get(name, name))
        return beliefs

    def _normalizer(self, equation: Any, operands: list[Operand]) -> list[Operand]:
        """A caught normaliser, on what is known of its input."""
        norm, batch = equation.params["norm"], equation.params["batch"]
        x, leaves = operands[0], [leaf.value for leaf in operands[1:]]
        axis = norm.module.axis % (x.value.ndim - len(batch)) + len(batch)
        state, lost_at = _state_for(x, axis)
        training = not norm.module.use_running_average
        if training:
            self._record(norm, x, state, lost_at, axis, [] if batch else leaves)

        def apply(x: jax.Array, *leaves: jax.Array) -> Any:
            y, stats, handed_on = norm.apply(x, state, *leaves)
            return (y, stats, handed_on) if shared else (y, stats, None)

        shared = not batch or norm.hands_on_the_same(batch)
        y, stats, handed_on = mapped(apply, batch, (0, 0, None))(x.value, *leaves)
        belief: Belief = Lost(f"{norm.path}: under jax.vmap each has its own state")
        if shared:
            belief = Known.of(_full(handed_on, x.value.shape[axis]), axis)
        return [Operand(y, belief), *map(Operand, stats)]

    def _record(
        self,
        norm: Normalizer,
        x: Operand,
        state: KalmanState | None,
        lost_at: str | None,
        axis: int,
        leaves: Sequence[jax.Array],
    ) -> None:
        if lost_at is not None and self.strict:
            raise ValueError(_refusal(norm, lost_at))
        facts = {}
        if self.explain:
            gain = norm.gain(x.value, *leaves) if leaves else None
            facts = report(norm.module, x.value, state, axis, gain)
        through = x.belief.through if isinstance(x.belief, Known) else ()
        self.rows.append(Row(norm.path, state is not None, through, lost_at, **facts))

    def _refuse(self, equation: Any) -> None:
        """Adds the rows of normalisers in an operation that is not looked into."""
        for norm in nested.normalizers_in(equation):
            lost_at = f"{self.at(equation)}: it is not looked into"
            if self.strict:
                raise ValueError(_refusal(norm, lost_at))
            self.rows.append(Row(norm.path, False, (), lost_at))


def _state_for(x: Operand, axis: int) -> tuple[KalmanState | None, str | None]:
    """The state of a normaliser's input, or why there is none."""
    belief = x.belief
    if isinstance(belief, Lost):
        return None, belief.at
    if belief is None:
        return None, "nothing is known of the input: name it in input_states"
    if belief.axis not in (None, axis):
        return None, f"it normalises axis {axis}; the channels are at {belief.axis}"
    return belief.of_channels(x.value.shape[axis]), None


def _refusal(norm: Normalizer, lost_at: str) -> str:
    return (
        f"the normaliser {norm.path!r} gets no prediction (strict=True): {lost_at}."
        " Give a rule with kalman_flax.register_rule, or leave strict out."
    )


def _full(state: KalmanState, channels: int) -> KalmanState:
    """The state ``[C]`` of what a normaliser without scale and bias puts out, too: its
    scalars, which a Signal repeats along its last axis, wherever the channels are."""

    def fill(stat: jax.Array) -> jax.Array:
        one = stat.ndim and stat.shape[0] != channels
        return jnp.broadcast_to(stat[:1] if one else stat, (channels,))

    return KalmanState(*map(fill, state))


def _literal(equation: Any, operands: Sequence[Operand]) -> Operand | None:
    """The cast of a number in the source stays a number, so that max(x, 0) is seen."""
    if equation.primitive.name != "convert_element_type":
        return None
    value = operands[0].value
    if not isinstance(value, (int, float, np.ndarray, np.generic)) or np.ndim(value):
        return None
    return Operand(np.asarray(value, equation.params["new_dtype"]))


def _compact(
    equation: Any, operands: Sequence[Operand], outputs: Sequence[jax.Array]
) -> Any:
    """The output before it was broadcast, see `Operand.compact`."""
    if len(outputs) != 1:
        return None
    name, shape = equation.primitive.name, np.shape(outputs[0])
    if name == "broadcast_in_dim":
        return broadcast_small(operands[0], equation.params)
    if name == "pvary":
        return operands[0].small
    if name not in ELEMENTWISE and name != "convert_element_type":
        return None
    small = np.broadcast_shapes(*(np.shape(x.small) for x in operands))
    if small == shape or len(small) != len(shape):
        return None
    values = vary_alike([jnp.broadcast_to(x.small, small) for x in operands])
    return equation.primitive.bind(*values, **equation.params)
