"""An operation of a traced program, as the rules see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kalman_flax._filter.observe import observe
from kalman_flax._filter.state import KalmanState
from kalman_flax.filtered.belief import Known, Lost, Operand


class Unknown(Exception):
    """Raised by a rule that does not cover a case: the state is lost, for a reason."""


@dataclasses.dataclass
class Operation:
    """One operation: what went in, with what is believed of it, and what came out.

    Attributes:
        primitive: the JAX primitive.
        params: its parameters.
        operands: its operands, at least one of them with a state.
        outputs: the arrays that it gave.
    """

    primitive: Any
    params: dict[str, Any]
    operands: list[Operand]
    outputs: list[jax.Array]

    @property
    def name(self) -> str:
        """Of the primitive."""
        return self.primitive.name

    @property
    def ndim(self) -> int:
        """Number of axes of the first output."""
        return self.outputs[0].ndim

    @property
    def known(self) -> list[Known]:
        """What is known of those operands of which something is."""
        return [x.belief for x in self.operands if isinstance(x.belief, Known)]

    def only(self, index: int = 0) -> Known:
        """What is known of operand `index`, where all the others are constants."""
        for position, operand in enumerate(self.operands):
            if (position == index) != isinstance(operand.belief, Known):
                raise Unknown(f"operand {position} is not the one with the state")
        belief = self.operands[index].belief
        assert isinstance(belief, Known)  # as was just seen
        return belief

    def axis(self) -> int | None:
        """The channel axis that all known operands agree on."""
        axes = {known.axis for known in self.known if known.axis is not None}
        if len(axes) > 1:
            raise Unknown(f"the channels are at different axes, {sorted(axes)}")
        return axes.pop() if axes else None

    def evaluate(self, *operands: Any) -> jax.Array:
        """The operation, elementwise, on other operands: any shapes that broadcast.

        Computes in float32 what the program does in less.
        """
        arrays = [_at_least_float32(x) for x in operands]
        arrays = vary_alike(jnp.broadcast_arrays(*arrays))
        return self.primitive.bind(*arrays, **self.params)


def _at_least_float32(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    low = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if low else x


def varying(x: jax.Array) -> frozenset[str]:
    """The axes of a `shard_map` over whose devices `x` may differ."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return getattr(aval, "vma", frozenset()) if kind is None else kind.varying


def vary_alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """In `shard_map`, lets all vary over the devices as any of them does."""
    axes = [varying(x) for x in arrays]
    every = frozenset().union(*axes)
    return [
        lax.pcast(x, tuple(every - own), to="varying") if every - own else x
        for x, own in zip(arrays, axes)
    ]


def per_channel(operand: Operand, axis: int | None, ndim: int) -> jax.Array | None:
    """A constant as ``[C]`` or a scalar; None if it is not one for each channel."""
    small = operand.small
    shape = np.shape(small)
    if all(size == 1 for size in shape):
        return jnp.reshape(small, ())
    if axis is None or len(shape) != ndim:
        return None
    if any(size > 1 for i, size in enumerate(shape) if i != axis):
        return None
    return jnp.reshape(small, (-1,))


def as_signal(operand: Operand, axis: int | None, full: tuple[int, ...]) -> KalmanState:
    """Moments of an operand that is independent of the others, over its positions.

    Of a constant they are observed, where it is smaller than `full`, the shape that it
    is broadcast to, or the same for all examples: an embedding of positions or of time.
    Raises `Unknown` for one of which nothing is known.
    """
    if isinstance(operand.belief, Known):
        return operand.belief.state
    if isinstance(operand.belief, Lost):
        raise Unknown(operand.belief.at)
    shape = np.shape(operand.small)
    if len(full) > 1 and shape == full and shape[0] > 1:
        raise Unknown("an array of which nothing is known meets one with a state")
    return _observed(operand.small, axis)


def as_gate(operand: Operand, axis: int | None, full: tuple[int, ...]) -> KalmanState:
    """The same of a factor, whose own state may be lost: one value for a channel of an
    example, as in squeeze-and-excite, is observed as a max-pool's output is."""
    shape = np.shape(operand.small)
    smaller = len(shape) == len(full) and shape != full
    of_examples = all(n == 1 for i, n in enumerate(shape) if i not in (0, axis))
    if isinstance(operand.belief, Lost) and smaller and of_examples:
        return _observed(operand.small, axis)
    return as_signal(operand, axis, full)


def _observed(small: Any, axis: int | None) -> KalmanState:
    small = jnp.asarray(small, jnp.float32)
    if not small.ndim or axis is None or small.shape[axis] == 1:
        return KalmanState(jnp.mean(small), jnp.var(small))
    return observe(small, axis=axis)


def broadcast_small(operand: Operand, params: dict[str, Any]) -> Any:
    """`Operand.compact` of what ``broadcast_in_dim`` makes of `operand`."""
    small = operand.small
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], np.shape(small)):
        shape[axis] = size
    if tuple(shape) == tuple(params["shape"]):
        return None
    reshape = jnp.reshape if isinstance(small, jax.Array) else np.reshape
    return reshape(small, shape)
