"""Rules of operations that move values about: the state follows the channel axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from kalman_flax._filter.mixture import predict_mixture
from kalman_flax._filter.predict import predict_concatenate, predict_pad_channels
from kalman_flax._filter.state import KalmanState
from kalman_flax.filtered.belief import Known, Operand
from kalman_flax.filtered.operation import Operation, Unknown, per_channel


def transpose(op: Operation) -> Known:
    """The channels go where their axis goes."""
    known = op.only()
    if known.axis is None:
        return known.laid_out(None)
    return known.laid_out(list(op.params["permutation"]).index(known.axis))


def squeeze(op: Operation) -> Known:
    """Axes of size 1 go; one of a single channel stays known by its scalars."""
    known, gone = op.only(), op.params["dimensions"]
    if known.axis is None or known.axis in gone:
        return Known.of(_scalars(known.state), None, like=[known])
    return known.laid_out(known.axis - sum(axis < known.axis for axis in gone))


def _scalars(state: KalmanState) -> KalmanState:
    return KalmanState(*(jnp.reshape(stat, ()) for stat in state))


def broadcast_in_dim(op: Operation) -> Known:
    """The channels keep their size, or are one that is repeated."""
    known, shape = op.only(), op.operands[0].value.shape
    where = op.params["broadcast_dimensions"]
    if known.axis is None:
        return known.laid_out(None)
    axis = where[known.axis]
    if op.params["shape"][axis] != shape[known.axis]:
        return Known.of(_scalars(known.state), None, like=[known])
    return known.laid_out(axis)


def reshape(op: Operation) -> Known:
    """Channels that keep an axis of their own, or are flattened with positions: each
    position then makes features of its own. Split channels are lost."""
    known = op.only()
    shape, new = op.operands[0].value.shape, op.outputs[0].shape
    if known.axis is None:
        return known.laid_out(None)
    for olds, news in _groups(shape, new):
        if known.axis not in olds:
            continue
        wide = [axis for axis in news if new[axis] > 1]
        if len(wide) > 1:
            if [shape[i] for i in olds if shape[i] > 1] != [new[i] for i in wide]:
                raise Unknown("it splits the channels over several axes")
            return known.laid_out(
                wide[[i for i in olds if shape[i] > 1].index(known.axis)]
            )
        axis = wide[0] if wide else news[-1]
        ones = [shape[i] if i == known.axis else 1 for i in olds]
        full = [shape[i] for i in olds]
        state = known.of_channels(shape[known.axis])
        if math.prod(full) > shape[known.axis] and 0 in olds and len(olds) > 1:
            raise Unknown("it mixes channels with examples")
        state = KalmanState(
            *(jnp.broadcast_to(s.reshape(ones), full).reshape(-1) for s in state)
        )
        return Known.of(state, axis, like=[known])
    raise Unknown("its channels cannot be followed")


def _groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes of `old` and `new` that hold the same values."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        olds, news = old[i : i + 1], new[j : j + 1]
        first = i, j
        i, j = i + len(olds), j + len(news)
        while math.prod(olds) != math.prod(news):
            if math.prod(olds) < math.prod(news):
                olds, i = old[first[0] : i + 1], i + 1
            else:
                news, j = new[first[1] : j + 1], j + 1
        groups.append(([*range(first[0], i)], [*range(first[1], j)]))
    return groups


def concatenate(op: Operation) -> Known:
    """On the channels joins the states; on positions mixes them by their share."""
    axis, along = op.axis(), op.params["dimension"]
    shapes = [x.value.shape for x in op.operands]
    axis = op.ndim - 1 if axis is None else axis
    states = [
        _state(x, shape[axis], axis, op.ndim) for x, shape in zip(op.operands, shapes)
    ]
    if along == axis:
        return Known.of(predict_concatenate(states), axis, like=op.known)
    total = sum(shape[along] for shape in shapes)
    shares = [shape[along] / total for shape in shapes]
    if all(state is states[0] for state in states):
        return Known.of(states[0], axis, like=op.known)
    return Known.of(predict_mixture(states, shares), axis, like=op.known)


def _state(operand: Operand, channels: int, axis: int, ndim: int) -> KalmanState:
    if isinstance(operand.belief, Known):
        return operand.belief.of_channels(channels)
    value = per_channel(operand, axis, ndim)
    if value is None:
        raise Unknown("it joins one with a state and one without")
    mean = jnp.broadcast_to(jnp.asarray(value, jnp.float32), (channels,))
    return KalmanState(mean, jnp.zeros_like(mean))


def pad(op: Operation) -> Known:
    """With a constant: of the channels, or of the positions, where it has a share."""
    known, config = op.only(), op.params["padding_config"]
    fill = jnp.asarray(op.operands[1].value, jnp.float32)
    shape, state, axis = op.operands[0].value.shape, known.state, known.axis
    if axis is not None:
        low, high, inside = config[axis]
        if min(low, high) < 0 or inside:
            raise Unknown("channels are cropped or pulled apart by padding")
        if low or high:
            state = known.of_channels(shape[axis])
            mean, var = predict_pad_channels(
                KalmanState(state.mean - fill, state.var), low, high
            )
            state = KalmanState(mean + fill, var)
    spatial = [c for i, c in enumerate(config) if i != axis]
    if all(c == (0, 0, 0) for c in spatial):
        return Known.of(state, axis, like=[known])
    if any(min(low, high) < 0 for low, high, _ in spatial):
        raise Unknown("it crops and pads at once")
    kept = 1.0
    for i, (low, high, inside) in enumerate(config):
        if i != axis:
            size = shape[i]
            kept *= size / (size + low + high + max(size - 1, 0) * inside)
    filled = KalmanState(fill, jnp.zeros(()))
    mixed = predict_mixture([state, filled], [kept, 1.0 - kept])
    plain = axis is None or config[axis] == (0, 0, 0)
    zeros = (
        not np.any(op.operands[1].value) if _literal(op.operands[1].value) else False
    )
    unpadded = None
    if plain and zeros and all(inside == 0 for *_, inside in config):
        before = Known.of(state, axis)
        unpadded = before, [(low, high) for low, high, _ in config]
    return Known.of(mixed, axis, like=[known], unpadded=unpadded)


def _literal(value: object) -> bool:
    return isinstance(value, (int, float, np.ndarray, np.generic))


def crop(op: Operation) -> Known:
    """`slice`: of positions the same state, of channels theirs."""
    known, axis = op.only(), op.only().axis
    if axis is None:
        return known.laid_out(None)
    start, stop = (op.params[f"{end}_indices"][axis] for end in ("start", "limit"))
    step = (op.params["strides"] or [1] * op.ndim)[axis]
    state = known.of_channels(op.operands[0].value.shape[axis])
    if (start, stop, step) == (0, state.mean.shape[0], 1):
        return known.laid_out(axis)
    return Known.of(
        KalmanState(*(s[start:stop:step] for s in state)), axis, like=[known]
    )


def dynamic_slice(op: Operation) -> Known:
    """The same with indices that are computed."""
    known, axis = op.only(), op.only().axis
    if axis is None:
        return known.laid_out(None)
    channels = op.operands[0].value.shape[axis]
    if op.params["slice_sizes"][axis] == channels:
        return known.laid_out(axis)
    start, size = op.operands[1 + axis].value, op.params["slice_sizes"][axis]
    state = known.of_channels(channels)
    cut = (lax.dynamic_slice_in_dim(stat, start, size) for stat in state)
    return Known.of(KalmanState(*cut), axis, like=[known])


def split(op: Operation) -> list[Known]:
    """Into pieces along an axis."""
    known, along = op.only(), op.params["axis"]
    if known.axis != along:
        return [known.laid_out(known.axis) for _ in op.outputs]
    state = known.of_channels(op.operands[0].value.shape[along])
    ends = np.cumsum(op.params["sizes"])[:-1]
    pieces = zip(*(jnp.split(stat, ends) for stat in state))
    return [Known.of(KalmanState(*piece), along, like=[known]) for piece in pieces]


def reverse(op: Operation) -> Known:
    """Positions as they are; channels in their order."""
    known, axis = op.only(), op.only().axis
    if axis not in op.params["dimensions"]:
        return known.laid_out(axis)
    state = known.of_channels(op.operands[0].value.shape[axis])
    return Known.of(KalmanState(*(stat[::-1] for stat in state)), axis, like=[known])


def gather(op: Operation) -> Known:
    """Of positions, such as those of the nearest neighbours in a resize."""
    known, numbers = op.only(), op.params["dimension_numbers"]
    if known.axis is None:
        return known.laid_out(None)
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    shape, sizes = op.operands[0].value.shape, op.params["slice_sizes"]
    if known.axis in gone or sizes[known.axis] != shape[known.axis]:
        raise Unknown("it picks channels")
    kept = [axis for axis in range(len(shape)) if axis not in gone]
    return known.laid_out(numbers.offset_dims[kept.index(known.axis)])
