"""Kalman Normalization in float64. A state is a pair of arrays, mean and variance."""

import math

import numpy as np


def observe(x, over="batch", num_groups=None, mask=None):
    """Moments of ``[N, ..., C]`` over sets: ``[C]`` for "batch", else ``[N, C]``."""
    x = np.asarray(x, np.float64)
    mask = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    examples, channels = x.shape[0], x.shape[-1]
    groups = {"batch": channels, "instance": channels, "layer": 1}.get(over, num_groups)
    size = channels // groups
    mean, var = np.zeros((2, examples, channels))
    for n in range(examples):
        for c in range(channels):
            first = c // size * size
            index = (
                slice(None) if over == "batch" else n,
                ...,
                slice(first, first + size),
            )
            values = x[index][mask[index]]
            if values.size:
                mean[n, c] = values.mean()
                var[n, c] = np.square(values - values.mean()).mean()
    return (mean[0], var[0]) if over == "batch" else (mean, var)


def conv(
    mean,
    var,
    kernel,
    input_size,
    strides=1,
    padding="SAME",
    input_dilation=1,
    kernel_dilation=1,
    feature_group_count=1,
    bias=0.0,
):
    """Independent inputs of one mean and variance per channel, ``[C]``, convolved.

    Walks over every tap of every output position, and adds up the weights of the taps
    that read the same value.
    """
    kernel = np.asarray(kernel, np.float64)
    *taps, channels, features = kernel.shape
    rank, groups = len(taps), feature_group_count
    strides, input_dilation, kernel_dilation = (
        (numbers,) * rank if isinstance(numbers, int) else numbers
        for numbers in (strides, input_dilation, kernel_dilation)
    )
    full = np.zeros((*taps, channels * groups, features))
    for group in range(groups):
        rows = slice(group * channels, (group + 1) * channels)
        columns = slice(group * features // groups, (group + 1) * features // groups)
        full[..., rows, columns] = kernel[..., columns]
    spans = [(k - 1) * d + 1 for k, d in zip(taps, kernel_dilation)]
    lengths = [(n - 1) * d + 1 for n, d in zip(input_size, input_dilation)]
    pads = [
        _zeros(padding, *axis) for axis in zip(range(rank), lengths, spans, strides)
    ]
    outputs = [
        len(range(0, n + sum(pad) - span + 1, s))
        for n, span, s, pad in zip(lengths, spans, strides, pads)
    ]

    def source(axis, place):
        """The value that a tap reads there, or None for a zero."""
        size = input_size[axis]
        if padding == "CIRCULAR":
            return place % size
        if padding == "REFLECT":
            return [*range(size), *range(size - 2, 0, -1)][place % (2 * size - 2)]
        inside = 0 <= place < lengths[axis] and place % input_dilation[axis] == 0
        return place // input_dilation[axis] if inside else None

    local_mean, local_var = np.zeros((2, *outputs, features))
    for out in np.ndindex(*outputs):
        weights = {}
        for tap in np.ndindex(*taps):
            places = [
                out[i] * strides[i] - pads[i][0] + tap[i] * kernel_dilation[i]
                for i in range(rank)
            ]
            read = tuple(source(i, place) for i, place in enumerate(places))
            if None not in read:
                weights[read] = weights.get(read, 0.0) + full[tap]
        for weight in weights.values():
            local_mean[out] += np.asarray(mean) @ weight
            local_var[out] += np.asarray(var) @ weight**2
    positions = tuple(range(rank))
    out_mean = local_mean.mean(positions)
    spread = np.square(local_mean - out_mean).mean(positions)
    return out_mean + bias, local_var.mean(positions) + spread


def _zeros(padding, axis, size, span, stride):
    """How many zeros, or other values, are before and after the map."""
    if padding == "VALID":
        return 0, 0
    if padding == "SAME":
        return _same(size, span, stride)
    if padding == "CAUSAL":
        return span - 1, 0
    if padding in ("CIRCULAR", "REFLECT"):
        return (span - 1) // 2, span // 2
    if isinstance(padding, int):
        return padding, padding
    return padding[axis]


def _same(size, span, stride):
    outputs = math.ceil(size / stride)
    total = max((outputs - 1) * stride + span - size, 0)
    return total // 2, total - total // 2


def dense(mean, var, kernel, bias=0.0):
    """``[C]`` through a matrix ``[C, D]``."""
    out_mean, out_var = np.zeros((2, kernel.shape[1]))
    for c, d in np.ndindex(*kernel.shape):
        out_mean[d] += mean[c] * float(kernel[c, d])
        out_var[d] += var[c] * float(kernel[c, d]) ** 2
    return out_mean + bias, out_var


def affine(mean, var, scale, bias):
    """``scale x + bias``."""
    return scale * mean + bias, scale**2 * var


def relu(mean, var):
    """``max(x, 0)`` of a Gaussian."""
    s = np.sqrt(np.asarray(var, np.float64))
    a = mean / s
    cdf = np.vectorize(lambda t: 0.5 * math.erfc(-t / math.sqrt(2)))(a)
    pdf = np.exp(-(a**2) / 2) / math.sqrt(2 * math.pi)
    out_var = s**2 * ((1 + a**2) * cdf + a * pdf - (a * cdf + pdf) ** 2)
    return mean * cdf + s * pdf, out_var


def pointwise(mean, var, fn):
    """``fn(x)`` of a Gaussian, by the trapezoidal rule."""
    z = np.linspace(-12, 12, 20_001)
    weights = np.exp(-(z**2) / 2)
    weights /= weights.sum()
    values = fn(np.asarray(mean)[..., None] + np.sqrt(var)[..., None] * z)
    out_mean = values @ weights
    return out_mean, np.square(values - out_mean[..., None]) @ weights


def avg_pool(mean, var, window, input_size, strides, padding, count_include_pad):
    """Averages of neighbours that are all alike: 1-D."""
    before, after = _zeros(padding, 0, input_size, window, strides)
    local_mean, local_var = [], []
    for first in range(-before, input_size + after - window + 1, strides):
        read = [i for i in range(first, first + window) if 0 <= i < input_size]
        share = len(read) / (window if count_include_pad else len(read))
        local_mean.append(share * mean)
        local_var.append(share**2 * var)
    return np.mean(local_mean, 0), np.mean(local_var, 0) + np.var(local_mean, 0)


def update(predicted, observed, gain, rule):
    """Eq. 6 and the last line of Eq. 7, or the variance of the mixture."""
    p, q = 1 - np.asarray(gain, np.float64), np.asarray(gain, np.float64)
    mean = p * predicted[0] + q * observed[0]
    var = p * predicted[1] + q * observed[1]
    if rule == "mixture":
        var = var + p * q * (observed[0] - predicted[0]) ** 2
    return mean, var


def normalize(x, mean, var, scale, bias, epsilon):
    """``[N, ..., C]`` by ``[C]`` or ``[N, C]``, one example and channel at a time."""
    x = np.asarray(x, np.float64)
    mean, var = (np.broadcast_to(s, (len(x), x.shape[-1])) for s in (mean, var))
    y = np.empty_like(x)
    for n, c in np.ndindex(*mean.shape):
        standard = (x[n, ..., c] - mean[n, c]) / math.sqrt(var[n, c] + epsilon)
        y[n, ..., c] = scale[c] * standard + bias[c]
    return y
