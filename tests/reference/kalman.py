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
    strides=(1, 1),
    padding="SAME",
    kernel_dilation=(1, 1),
    feature_group_count=1,
    bias=0.0,
):
    """Independent inputs of one mean and variance per channel, ``[C]``, convolved.

    Walks over every tap of every output position.
    """
    kernel = np.asarray(kernel, np.float64)
    *taps, group_channels, features = kernel.shape
    spans = [(k - 1) * d + 1 for k, d in zip(taps, kernel_dilation)]
    if padding == "VALID":
        padding = [(0, 0), (0, 0)]
    elif padding == "SAME":
        padding = [_same(n, span, s) for n, span, s in zip(input_size, spans, strides)]
    outputs = [
        len(range(0, n + sum(pad) - span + 1, s))
        for n, span, s, pad in zip(input_size, spans, strides, padding)
    ]
    local_mean, local_var = np.zeros((2, *outputs, features))
    for i, j in np.ndindex(*outputs):
        for h, w in np.ndindex(*taps):
            row = i * strides[0] - padding[0][0] + h * kernel_dilation[0]
            col = j * strides[1] - padding[1][0] + w * kernel_dilation[1]
            if not (0 <= row < input_size[0] and 0 <= col < input_size[1]):
                continue
            for d in range(features):
                group = d // (features // feature_group_count)
                for c in range(group_channels):
                    weight, source = kernel[h, w, c, d], group * group_channels + c
                    local_mean[i, j, d] += weight * mean[source]
                    local_var[i, j, d] += weight**2 * var[source]
    out_mean = local_mean.mean((0, 1))
    spread = np.square(local_mean - out_mean).mean((0, 1))
    return out_mean + bias, local_var.mean((0, 1)) + spread


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


def avg_pool(mean, var, size, correlation):
    """The mean of `size` values, any two of which correlate."""
    covariance = 0.0
    for i, j in np.ndindex(size, size):
        covariance += var if i == j else correlation * var
    return mean, covariance / size**2


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
