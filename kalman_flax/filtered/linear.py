"""Rules of linear operations with constant weights, and of pooling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kalman_flax._filter.convolution import predict_conv
from kalman_flax._filter.observe import observe
from kalman_flax._filter.predict import predict_dense, predict_product
from kalman_flax._filter.state import KalmanState
from kalman_flax.filtered.belief import Known
from kalman_flax.filtered.operation import Operation, Unknown


def convolution(op: Operation) -> Known:
    """Any number of spatial axes, strides, dilations, groups; transposed ones too."""
    known, params = op.only(), op.params
    inputs, kernels, outputs = params["dimension_numbers"]
    if known.axis not in (None, inputs[1]):
        raise Unknown(f"its channels are at axis {inputs[1]}, not at {known.axis}")
    if params["batch_group_count"] != 1:
        raise Unknown("batch_group_count is not 1")
    before, padding = known, params["padding"]
    size = [op.operands[0].value.shape[axis] for axis in inputs[2:]]
    if known.unpadded and max(params["lhs_dilation"], default=1) == 1:
        before, pads = known.unpadded
        pads = [pads[axis] for axis in inputs[2:]]
        padding = [
            (low + more_low, high + more_high)
            for (low, high), (more_low, more_high) in zip(padding, pads)
        ]
        size = [n - low - high for n, (low, high) in zip(size, pads)]
    kernel = kernel_last(op.operands[1].value, kernels)
    state = predict_conv(
        before.of_channels(kernel.shape[-2] * params["feature_group_count"]),
        kernel,
        size,
        strides=params["window_strides"],
        padding=padding,
        input_dilation=params["lhs_dilation"],
        kernel_dilation=params["rhs_dilation"],
        feature_group_count=params["feature_group_count"],
    )
    return Known.of(state, outputs[1], like=[known])


def kernel_last(kernel: jax.Array, spec: tuple[int, ...]) -> jax.Array:
    """A kernel of layout `spec` as ``[..., C, D]``, the spatial axes first."""
    out_axis, in_axis, *spatial = spec
    return jnp.transpose(kernel, (*spatial, in_axis, out_axis))


def kernel_back(kernel: jax.Array, spec: tuple[int, ...]) -> jax.Array:
    """The inverse of `kernel_last`."""
    out_axis, in_axis, *spatial = spec
    return jnp.transpose(
        kernel, tuple(np.argsort((*spatial, in_axis, out_axis)).tolist())
    )


def dot_general(op: Operation) -> Known:
    """A dense layer over the channels, or weights over one axis of positions."""
    index = 0 if isinstance(op.operands[0].belief, Known) else 1
    known = op.only(index)
    contracted, batch = op.params["dimension_numbers"]
    if batch[0]:
        raise Unknown("a product for each of a batch of matrices")
    x, w = op.operands[index], op.operands[1 - index]
    ours, theirs = contracted[index], contracted[1 - index]
    kept = [i for i in range(x.value.ndim) if i not in ours]
    free = [i for i in range(w.value.ndim) if i not in theirs]
    kernel = jnp.transpose(w.value, (*theirs, *free))
    first = len(free) if index == 1 else 0  # where the axes of x begin in the output
    if known.axis not in ours and known.axis is not None:
        axis = first + kept.index(known.axis)
        sums = jnp.asarray(kernel, jnp.float32).reshape(-1, *kernel.shape[len(ours) :])
        return Known.of(_weighted_sum(known.state, sums), axis, like=[known])
    if len(ours) != 1 or len(free) != 1:
        raise Unknown("it contracts the channels and more, or leaves them in two axes")
    axis = 0 if index == 1 else len(kept)
    return Known.of(predict_dense(known.state, kernel), axis, like=[known])


def _weighted_sum(state: KalmanState, weights: jax.Array) -> KalmanState:
    """Sums of independent positions by weights ``[positions, outputs...]``: resizing,
    or a layer that mixes positions. Over all outputs: law of total variance."""
    sums, squares = jnp.sum(weights, 0), jnp.sum(jnp.square(weights), 0)
    mean = state.mean * jnp.mean(sums)
    spread = jnp.square(state.mean) * jnp.var(sums)
    return KalmanState(mean, state.var * jnp.mean(squares) + spread)


def window_sum(op: Operation) -> Known:
    """Sum over windows, of values that go together (`predict_avg_pool`); those at the
    border sum up fewer. The mean over them is this divided by a constant."""
    known, params = op.only(), op.params
    window = params["window_dimensions"]
    if known.axis is not None and window[known.axis] > 1:
        raise Unknown("it sums over channels")
    if max(*params["base_dilation"], *params["window_dilation"]) > 1:
        raise Unknown("a dilated window")
    counts = np.ones(())
    for size, taps, stride, (low, high) in zip(
        op.operands[0].value.shape, window, params["window_strides"], params["padding"]
    ):
        outputs = (size + low + high - taps) // stride + 1
        first = np.arange(outputs) * stride - low
        inside = np.minimum(first + taps, size) - np.maximum(first, 0)
        whole = np.all(inside == inside[0])
        counts = np.multiply.outer(counts, inside[:1] if whole else inside)
    state = known.state
    moved = predict_product(
        state, KalmanState(float(counts.mean()), float(counts.var()))
    )
    return Known.of(moved, known.axis, like=[known], base=(state, np.float32(counts)))


def window_max(op: Operation) -> Known:
    """The maximum of correlated values has no good closed form: observed afresh."""
    window, ndim = op.params["window_dimensions"], op.ndim
    belief = op.operands[0].belief
    axis = belief.axis if isinstance(belief, Known) else None
    if axis is None:
        axis = ndim - 1
    if window[axis] > 1:
        raise Unknown("a maximum over channels")
    return Known.of(observe(op.outputs[0], axis=axis), axis, like=op.known)


def reduction(op: Operation) -> Known:
    """Over positions a state ends: the variance of a mean is that between examples, of
    which it says nothing. Over an axis of size 1 nothing happens."""
    known = op.only()
    axes = op.params["axes"]
    if any(op.operands[0].value.shape[axis] > 1 for axis in axes):
        over = "the channels" if known.axis in axes else "positions"
        raise Unknown(f"the state ends where {over} are reduced")
    axis = known.axis
    return known.laid_out(axis and axis - sum(other < axis for other in axes))
