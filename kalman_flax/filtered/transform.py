"""`filtered`: the Kalman filter in an unmodified Flax model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from kalman_flax._filter.state import KalmanState, for_channels
from kalman_flax.filtered.belief import Known, Operand
from kalman_flax.filtered.explain import Row
from kalman_flax.filtered.interpret import Interpreter
from kalman_flax.filtered.kernels import (
    KernelMap,
    before_normalizers,
    kernels_before_normalizers,
    map_kernel,
)
from kalman_flax.filtered.linen import catcher
from kalman_flax.filtered.nested import normalizers
from kalman_flax.filtered.nnx import functional
from kalman_flax.layers.calibrated import not_training
from kalman_flax.layers.kalman_norm import KalmanNorm

#: part of the key of jax.jit's caches, so that no function that was traced with caught
#: normalisers, or with other options, serves where there are none
_options = jax.make_user_context(default_value=None)

#: options of `KalmanNorm` that need parameters, for which an `nn.BatchNorm` has no room
_NEEDS_PARAMETERS = ("learn_gain", "noise")
#: options that need more than ``mean`` and ``var`` in ``batch_stats``
_NEEDS_STATISTICS = ("decay_steps", "calibrate")
#: attributes of the model's own, which decide over its variables
_OF_THE_MODEL = {
    "parent", "name", "use_running_average", "axis", "param_dtype", "use_bias",
    "use_scale", "bias_init", "scale_init",
}  # fmt: skip
_OPTIONS = [
    field.name
    for field in dataclasses.fields(KalmanNorm)
    if field.name not in _OF_THE_MODEL
]


def filtered(
    fn: Callable[..., Any],
    *,
    input_states: Mapping[int | str, KalmanState] | None = None,
    strict: bool = False,
    kernel_map: KernelMap | None = None,
    **options: Any,
) -> FilteredFunction | FilteredModule:
    """Runs the Kalman filter through the program of an unmodified Flax model.

        apply = kf.filtered(model.apply, input_states={1: kf.KalmanState(0.0, 1.0)})
        logits, updates = apply(variables, images, train=True, mutable=["batch_stats"])

    Every `nn.BatchNorm` in it becomes a `KalmanNorm` in training, with the same name
    and variables, and gets the prediction of what is before it. In inference the
    program is the model's own. A `KalmanNorm` in the model keeps its own options.

    The function is traced, and evaluated with a `KalmanState` beside each value that
    depends on an argument in `input_states`, or on a normaliser; the table of rules is
    in `kalman_flax.filtered.rules`. All else, such as parameters, counts as a constant.
    Take `jax.jit`, `jax.grad`, `jax.vmap`, `jax.shard_map` of the result; inside of a
    `jax.jit` the second trace costs nothing at run time.

    Args:
        fn: a function of arrays, pytrees of these, and any static values; e.g. the
            ``apply`` of a linen module. Or an `nnx.Module`, to be called like it; its
            statistics move as they do in the module, and arguments count from 0.
        input_states: what is known of arguments, by position or keyword: scalars for
            every channel alike, or ``[C]``, with the channels last.
        strict: raise a ValueError where a normaliser gets no prediction.
        kernel_map: e.g. `centre_kernel`: convolve with this function of the kernels of
            convolutions whose output goes to a normaliser, in inference too. A network
            that was trained without it computes something else with it.
        **options: of `KalmanNorm`, such as ``gain``, ``decay_steps`` and ``calibrate``.
            The last two keep statistics of their own in ``batch_stats``, which a first
            step adds, and ``filtered(model.init, decay_steps=...)`` has from the start.

    Raises:
        ValueError: an option that `KalmanNorm` has not, or that needs parameters, for
            which an `nn.BatchNorm` has no room; an `input_states` that is not states;
            when called, an argument that is not there.
    """
    input_states = dict(input_states or {})
    _check(fn, input_states, options)
    if isinstance(fn, nnx.Module):
        return FilteredModule(fn, input_states, strict, kernel_map, options)
    return FilteredFunction(fn, input_states, strict, kernel_map, options)


class FilteredFunction:
    """What `filtered` returns: call it as the function itself."""

    def __init__(
        self,
        fn: Callable[..., Any],
        input_states: dict[int | str, KalmanState],
        strict: bool,
        kernel_map: KernelMap | None,
        options: dict[str, Any],
    ):
        functools.update_wrapper(self, fn, updated=())
        self._fn, self._input_states = fn, input_states
        self._strict, self._kernel_map, self._options = strict, kernel_map, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the function returns."""
        traced = self._trace(args, kwargs)
        if not normalizers(traced.program.jaxpr):
            return traced.outputs(jaxpr_as_fun(traced.program)(*traced.values))
        return traced.outputs(self._evaluate(traced)[0])

    def explain_call(self, args: Any, kwargs: Any) -> list[Row]:
        """The rows of `kalman_flax.explain`."""
        with not_training():
            traced = self._trace(args, kwargs)
        rows: list[Row] = []

        def run(values: Sequence[jax.Array]) -> list[Any]:
            _, rows[:] = self._evaluate(traced._replace(values=values), explain=True)
            return [row.report for row in rows]

        if not all(
            isinstance(x, jax.Array | np.ndarray | np.generic) for x in traced.values
        ):
            jax.eval_shape(run, traced.values)  # of shapes: nothing to compute with
            return [row.reporting() for row in rows]
        reports = jax.jit(run)(traced.values)
        return [row.reporting(*report) for row, report in zip(rows, reports)]

    def export_kernels(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns `variables` with the kernels as `kernel_map` made them, so that the
        model itself computes with them what this does; ``kernel_map`` is done with.

        Args:
            variables: the first argument of the function.
            *args, **kwargs: the others, such as images and ``train=False``.

        Raises:
            ValueError: no kernel_map; or the kernel of a convolution is computed, and
                is no array of `variables`.
        """
        if self._kernel_map is None:
            raise ValueError("this was made without a kernel_map: nothing to export.")
        traced = self._trace((variables, *args), kwargs)
        program = traced.program.jaxpr
        leaves, structure = jax.tree.flatten(variables)
        own = {
            var: index
            for index, var in enumerate(program.invars)
            if traced.arguments[index] == 0
        }
        for var, spec in kernels_before_normalizers(program):
            if var not in own:
                raise ValueError(
                    "the kernel of a convolution is computed in the model: there is no"
                    " variable to put what kernel_map makes of it in."
                )
            leaf = own[var]
            leaves[leaf] = map_kernel(self._kernel_map, leaves[leaf], spec)
        return jax.tree.unflatten(structure, leaves)

    def _trace(self, args: Any, kwargs: Any) -> Traced:
        paths, structure = jax.tree_util.tree_flatten_with_path((args, kwargs))
        leaves = [leaf for _, leaf in paths]
        where = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        names = [_argument(paths[i][0]) for i in where]
        for name in self._input_states:
            if name not in names:
                raise ValueError(
                    f"input_states names the argument {name!r}, which is no array of"
                    f" this call; arrays are in {sorted(set(map(str, names)))}."
                )
        out_structure = None

        def flat(*values: jax.Array) -> list[Any]:
            nonlocal out_structure
            filled = list(leaves)
            for i, value in zip(where, values):
                filled[i] = value
            args, kwargs = jax.tree.unflatten(structure, filled)
            outputs, out_structure = jax.tree.flatten(self._fn(*args, **kwargs))
            return outputs

        mapping = self._kernel_map is not None
        key = (tuple(sorted(self._options.items())), mapping)
        values = [leaves[i] for i in where]
        with (
            _options(key),
            nn.intercept_methods(catcher(self._options, inference=mapping)),
        ):
            program = jax.make_jaxpr(flat)(*values)
        return Traced(program, values, names, out_structure)

    def _evaluate(
        self, traced: Traced, explain: bool = False
    ) -> tuple[list[jax.Array], list[Row]]:
        program = traced.program
        convolutions = frozenset()
        if self._kernel_map is not None:
            convolutions = before_normalizers(program.jaxpr)
        interpreter = Interpreter(self._strict, explain, self._kernel_map, convolutions)
        operands = [
            Operand(value, self._belief(value, name))
            for value, name in zip(traced.values, traced.arguments)
        ]
        outputs = interpreter.run(program.jaxpr, program.consts, operands)
        return [x.value for x in outputs], interpreter.rows

    def _belief(self, value: jax.Array, name: int | str) -> Known | None:
        if name not in self._input_states or not np.ndim(value):
            return None
        state = self._input_states[name]
        state = KalmanState(*(jnp.asarray(stat, jnp.float32) for stat in state))
        if not state.mean.ndim and not state.var.ndim:
            return Known.of(state)
        axis = np.ndim(value) - 1
        return Known.of(for_channels(state, np.shape(value)[axis]), axis)


class FilteredModule:
    """What `filtered` returns for an NNX module: call it as the module, whose state it
    updates as the module would."""

    def __init__(
        self,
        model: nnx.Module,
        input_states: dict[int | str, KalmanState],
        strict: bool,
        kernel_map: KernelMap | None,
        options: dict[str, Any],
    ):
        for name in _NEEDS_STATISTICS:
            if options.get(name) is not None:
                raise ValueError(
                    f"{name} needs statistics of its own, which an nnx.BatchNorm has no"
                    " room for; build the model with kalman_flax.nnx.KalmanNorm and"
                    " this option."
                )
        self._model, self._settings = model, (strict, kernel_map, options)
        self._input_states = {
            name + 1 if isinstance(name, int) else name: state
            for name, state in input_states.items()
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the module returns."""
        outputs, state = self._filtered()(nnx.state(self._model), *args, **kwargs)
        nnx.update(self._model, state)
        return outputs

    def explain_call(self, args: Any, kwargs: Any) -> list[Row]:
        """The rows of `kalman_flax.explain`."""
        return self._filtered().explain_call((nnx.state(self._model), *args), kwargs)

    def _filtered(self) -> FilteredFunction:
        """Of the module as it is now: ``train()`` and ``eval()`` change it."""
        _, kernel_map, options = self._settings
        fn = functional(self._model, options, inference=kernel_map is not None)
        return FilteredFunction(fn, self._input_states, *self._settings)


class Traced(NamedTuple):
    """A program with its inputs."""

    program: ClosedJaxpr
    values: Sequence[jax.Array]
    arguments: Sequence[int | str]  # position or keyword, for each value
    structure: Any  # of the outputs

    def outputs(self, values: Sequence[jax.Array]) -> Any:
        """What the function returns."""
        return jax.tree.unflatten(self.structure, values)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic))


def _argument(path: Any) -> int | str:
    return path[1].idx if path[0].idx == 0 else path[1].key


def _check(
    fn: Any, input_states: Mapping[int | str, KalmanState], options: Mapping[str, Any]
) -> None:
    if not callable(fn):
        raise ValueError(f"filtered got {fn!r}; expected a function, e.g. model.apply.")
    for name, state in input_states.items():
        if not isinstance(name, (int, str)) or not isinstance(state, KalmanState):
            raise ValueError(
                f"input_states has {name!r}: {state!r}; expected the position or the"
                " keyword of an argument, and a KalmanState."
            )
    for name, value in options.items():
        if name not in _OPTIONS:
            raise ValueError(
                f"filtered has no option {name!r}; those of KalmanNorm are {_OPTIONS}."
            )
        if name in _NEEDS_PARAMETERS and value is not None:
            raise ValueError(
                f"{name}={value!r} needs a parameter, which the variables of an"
                " nn.BatchNorm have no room for; give the model norm=kf.KalmanNorm with"
                " this option, and filtered takes it as it is."
            )
    KalmanNorm(**options, parent=None)  # checks their values
