"""The table from JAX primitive to the rule that moves a state through it.

A rule gets an `Operation` and returns what is known of the output, a list of that for
several outputs; or raises `Unknown` with a reason. It is asked where at least one
operand has a state, and none has lost it, unless the rule takes those as well. What has
no rule loses the state, and `kalman_flax.explain` says where. A rule of your own:

    @kf.register_rule("my_scale")  # a primitive, or its name
    def my_scale(op):
        known = op.only()  # its state is [C], its channels at known.axis
        state = kf.filter.predict_affine(known.state, op.params["factor"], 0.0)
        return Known.of(state, known.axis, like=[known])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kalman_flax.filtered import layout, linear, pointwise
from kalman_flax.filtered.belief import Belief
from kalman_flax.filtered.operation import Operation

Rule = Callable[[Operation], Belief | Sequence[Belief]]


class Entry(NamedTuple):
    """A rule, and whether it takes operands that have lost their state."""

    rule: Rule
    takes_lost: bool


RULES: dict[str, Entry] = {}


def register_rule(
    primitive: Any, rule: Rule | None = None, *, takes_lost: bool = False
) -> Any:
    """Sets the rule of a primitive for `kalman_flax.filtered`; also a decorator.

    Args:
        primitive: a `jax.extend.core.Primitive`, or its name.
        rule: from an `Operation` to what is known of its output, see the example above.
        takes_lost: whether to ask it too where an operand has lost its state.
    """
    if rule is None:
        return lambda rule: register_rule(primitive, rule, takes_lost=takes_lost)
    name = getattr(primitive, "name", primitive)
    if not isinstance(name, str) or not callable(rule):
        raise ValueError(
            f"register_rule got {primitive!r} and {rule!r}; expected a primitive, or"
            " its name, and a function of an Operation."
        )
    RULES[name] = Entry(rule, takes_lost)
    return rule


# fmt: off
#: those that compute each element of the output from the same element of the operands
ELEMENTWISE = (
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2",
    "atanh", "cbrt", "ceil", "clamp", "cos", "cosh", "digamma", "div", "eq", "erf",
    "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow",
    "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul",
    "ne", "neg", "nextafter", "not", "or", "pow", "rem", "round", "rsqrt", "select_n",
    "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh", "xor",
)
#: those that change neither values nor places
SAME = (
    "copy", "copy_p", "device_put", "name", "optimization_barrier", "pvary",
    "reduce_precision", "sharding_constraint",
)
REDUCTIONS = (
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
    "argmax", "argmin",
)
#: those that leave a state as it is, and that explanations are silent about
QUIET = (
    *SAME, "convert_element_type", "stop_gradient", "transpose", "squeeze", "reshape",
    "broadcast_in_dim",
)
# fmt: on
#: what explanations call an operation
SHORT: dict[str, str] = {
    "conv_general_dilated": "conv",
    "dot_general": "dot",
    "reduce_window_sum": "window sum",
    "reduce_window_max": "window max, observed",
    "select_n": "select",
}

for _name in ELEMENTWISE:
    register_rule(_name, pointwise.elementwise, takes_lost=True)
for _name in SAME:
    register_rule(_name, pointwise.same)
for _name in REDUCTIONS:
    register_rule(_name, linear.reduction)

register_rule("convert_element_type", pointwise.cast)
register_rule("stop_gradient", pointwise.stop_gradient)

register_rule("conv_general_dilated", linear.convolution)
register_rule("dot_general", linear.dot_general)
register_rule("reduce_window_sum", linear.window_sum)
register_rule("reduce_window_max", linear.window_max, takes_lost=True)

register_rule("transpose", layout.transpose)
register_rule("squeeze", layout.squeeze)
register_rule("broadcast_in_dim", layout.broadcast_in_dim)
register_rule("reshape", layout.reshape)
register_rule("concatenate", layout.concatenate)
register_rule("pad", layout.pad)
register_rule("slice", layout.crop)
register_rule("dynamic_slice", layout.dynamic_slice)
register_rule("split", layout.split)
register_rule("rev", layout.reverse)
register_rule("gather", layout.gather)
