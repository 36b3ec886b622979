"""The authors' released filter on a small pre-activation network, in float64 loops.

Stem, a block whose input is normalised already, a block that normalises its own, final
norm. The stream carries the state "raw": what the update estimates of a normaliser's
input is handed on as the state of its output.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

GAIN = 0.1  # q; the released code calls p = 0.9 its rate
GUARD = 100.0
EPSILON = 1e-5


class Step(NamedTuple):
    """What one normaliser did."""

    output: np.ndarray  # [N, H, W, C], before scale and bias: those are 1 and 0
    mean: np.ndarray  # [C], filtered
    var: np.ndarray
    rejected: bool | None  # did the guard fire; None where there was no prediction


def run(x: np.ndarray, kernels: dict[str, np.ndarray]) -> dict[str, Step]:
    """Returns every normaliser's step on images ``[N, H, W, C]`` of unknown state.

    Args:
        x: the images.
        kernels: ``[3, 3, C, D]`` of stem, conv1_a, conv2_a, conv1_b and conv2_b.
    """
    steps = {}

    x = _conv(x, kernels["stem"])
    x, state = _norm(steps, "stem_norm", x, None)
    x, state = np.maximum(x, 0), _relu(state)
    # Block a: its shortcut is the rectified stream.
    y, branch = _residual(steps, "a", x, state, kernels)
    x, state = x + y, (state[0] + branch[0], state[1] + branch[1])
    # Block b: its shortcut is the stream before the norm, with the filtered state.
    y, state = _norm(steps, "norm1_b", x, state)
    y, branch = np.maximum(y, 0), _relu(state)
    y, branch = _residual(steps, "b", y, branch, kernels)
    x, state = x + y, (state[0] + branch[0], state[1] + branch[1])
    _norm(steps, "final_norm", x, state)
    return steps


def _residual(steps, block, y, state, kernels):
    """conv, norm, relu, conv."""
    first, second = kernels[f"conv1_{block}"], kernels[f"conv2_{block}"]
    state = _predict_conv(state, first, y.shape[1:3])
    y, state = _norm(steps, f"norm2_{block}", _conv(y, first), state)
    y, state = np.maximum(y, 0), _relu(state)
    return _conv(y, second), _predict_conv(state, second, y.shape[1:3])


def _norm(steps, name, x, predicted):
    channels = x.shape[-1]
    mean, var = np.zeros(channels), np.zeros(channels)
    for c in range(channels):
        mean[c] = x[..., c].sum() / x[..., c].size
        var[c] = ((x[..., c] - mean[c]) ** 2).sum() / x[..., c].size
    rejected = None
    if predicted is not None:
        pred_mean, pred_var = predicted
        ratio = sum(pred_var[c] / var[c] for c in range(channels)) / channels
        rejected = bool(ratio >= GUARD)
        if not rejected:
            q, p = GAIN, 1 - GAIN
            # The mixture uses the observed mean, so the variance comes first.
            var = p * pred_var + q * var + p * q * (mean - pred_mean) ** 2
            mean = p * pred_mean + q * mean
    output = (x - mean) / np.sqrt(var + EPSILON)
    steps[name] = Step(output, mean, var, rejected)
    return output, (mean, var)


def _positions(size):
    """Every output position with the (tap, input position) pairs it sees; SAME, 3x3."""
    height, width = size
    for i in range(height):
        for j in range(width):
            yield (
                (i, j),
                [
                    ((a, b), (i + a - 1, j + b - 1))
                    for a in range(3)
                    for b in range(3)
                    if 0 <= i + a - 1 < height and 0 <= j + b - 1 < width
                ],
            )


def _conv(x, kernel):
    y = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for (i, j), seen in _positions(x.shape[1:3]):
        for (a, b), (h, w) in seen:
            y[:, i, j] += x[:, h, w] @ kernel[a, b]
    return y


def _predict_conv(state, kernel, size):
    mean, var = state
    means, variances = [], []
    for _, seen in _positions(size):
        means.append(sum(mean @ kernel[a, b] for (a, b), _ in seen))
        variances.append(sum(var @ kernel[a, b] ** 2 for (a, b), _ in seen))
    # Over the map: mean of the variances plus variance of the means.
    return np.mean(means, 0), np.mean(variances, 0) + np.var(means, 0)


def _relu(state):
    means, variances = [], []
    for mean, var in zip(*state):
        s = math.sqrt(var)
        a = mean / s
        cdf = 0.5 * (1 + math.erf(a / math.sqrt(2)))
        pdf = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
        means.append(mean * cdf + s * pdf)
        variances.append(var * ((1 + a * a) * cdf + a * pdf - (a * cdf + pdf) ** 2))
    return np.array(means), np.array(variances)
