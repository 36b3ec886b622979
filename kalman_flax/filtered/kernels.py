"""Kernels of convolutions that meet a normaliser: found in the trace, and mapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from kalman_flax.filtered.linear import kernel_back, kernel_last
from kalman_flax.filtered.marker import kalman_norm_p
from kalman_flax.filtered.nested import programs

KernelMap = Callable[[jax.Array], jax.Array]

#: what may stand between a convolution and its normaliser: a bias, a cast, a layout
_BETWEEN = (
    "add", "convert_element_type", "copy", "name", "optimization_barrier", "pvary",
    "reshape", "squeeze", "transpose", "broadcast_in_dim", "sharding_constraint",
)  # fmt: skip


def before_normalizers(jaxpr: Jaxpr) -> frozenset[int]:
    """Returns the ids of the convolutions whose output meets a normaliser, in a program
    and in those inside of it."""
    return frozenset(map(id, _convolutions(jaxpr)))


def kernels_before_normalizers(jaxpr: Jaxpr) -> list[tuple[Any, tuple[int, ...]]]:
    """Returns the kernels of these, as variables of `jaxpr`, with their layouts."""
    return [
        (_origin(jaxpr, equation), equation.params["dimension_numbers"].rhs_spec)
        for equation in _convolutions(jaxpr)
    ]


def _origin(jaxpr: Jaxpr, convolution: Any) -> Any:
    """The variable that a kernel is, or is cast from."""
    var = convolution.invars[1]
    made = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
    while var in made and made[var].primitive.name == "convert_element_type":
        var = made[var].invars[0]
    return var


def _convolutions(jaxpr: Jaxpr) -> list[Any]:
    made = {var: equation for equation in jaxpr.eqns for var in equation.outvars}
    found: dict[int, Any] = {}

    def trace_back(var: Any, made: dict[Any, Any]) -> None:
        equation = None if isinstance(var, Literal) else made.get(var)
        if equation is None:
            return
        if equation.primitive.name == "conv_general_dilated":
            found[id(equation)] = equation
        elif equation.primitive.name in _BETWEEN:
            for operand in equation.invars:
                trace_back(operand, made)
        else:
            index = equation.outvars.index(var)
            for inner in programs(equation):
                if len(inner.outvars) == len(equation.outvars):
                    own = {v: e for e in inner.eqns for v in e.outvars}
                    trace_back(inner.outvars[index], own)

    for equation in jaxpr.eqns:
        if equation.primitive is kalman_norm_p:
            trace_back(equation.invars[0], made)
        for inner in programs(equation):
            found.update({id(e): e for e in _convolutions(inner)})
    return list(found.values())


def map_kernel(fn: KernelMap, kernel: jax.Array, spec: tuple[int, ...]) -> jax.Array:
    """Applies `fn`, of ``[h, w, C, D]``, to a kernel of layout `spec` and any number of
    spatial axes."""
    last = kernel_last(kernel, spec)
    flat = last.reshape(-1, 1, *last.shape[-2:])
    flat = fn(flat.astype(jnp.promote_types(kernel.dtype, jnp.float32)))
    return kernel_back(flat.reshape(last.shape).astype(kernel.dtype), spec)
