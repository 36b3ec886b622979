"""Streaming statistics and the control of the gradient, against loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kalman_flax.baselines.online_norm import OnlineNorm
from tests.baselines.test_moving_average_norm import (
    DEGENERATE,
    assert_contract,
    assert_finite,
    assert_mesh_equals_vmap,
    assert_train_step_moves_gradient_stats,
    each_degenerate,
    train_replicas,
)
from tests.reference.slow import few_quick

EPSILON = 1e-5
ALPHA_FORWARD, ALPHA_BACKWARD = 0.9, 0.8
FAST = {"alpha_forward": ALPHA_FORWARD, "alpha_backward": ALPHA_BACKWARD}


def reference(state, scale, bias, x, dz, scaled):
    """One stream, image by image, from the paper's equations."""
    mean, var, u, v = (state[k] for k in ("mean", "var", "u", "v"))
    a, b = ALPHA_FORWARD, ALPHA_BACKWARD
    outputs, gradients, clipped = [], [], 0
    grads = {"scale": 0.0, "bias": 0.0}
    for image, dz_image in zip(x, dz):
        std = np.sqrt(var + EPSILON)
        y = (image - mean) / std
        m, s = image.mean((0, 1)), image.var((0, 1))
        var = a * var + (1 - a) * s + a * (1 - a) * (m - mean) ** 2
        mean = a * mean + (1 - a) * m
        affine = scale * y + bias
        if scaled:
            rms = np.sqrt((affine**2).mean() + EPSILON)
            z = affine / rms
            d_affine = (dz_image - z * (dz_image * z).mean()) / rms
        else:
            z, d_affine = affine, dz_image
        grads["scale"] += (d_affine * y).sum((0, 1))
        grads["bias"] += d_affine.sum((0, 1))
        g = d_affine * scale
        h = g - (1 - b) * v * y
        moved = v + (h * y).mean((0, 1))
        overshoots = (1 - b) * (y**2).mean((0, 1)) > 1
        clipped += overshoots.sum()
        v = np.where(overshoots, (g * y).mean((0, 1)), moved)
        dx = h / std - (1 - b) * u
        u = u + dx.mean((0, 1))
        outputs.append(z)
        gradients.append(dx)
    new = {"mean": mean, "var": var, "u": u, "v": v}
    return np.stack(outputs), np.stack(gradients), grads, new, clipped


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
def test_values_and_gradients_are_those_of_the_recursion(replicas, scaled):
    norm = OnlineNorm(**FAST, layer_scaling=scaled)
    rng = np.random.default_rng(0)
    variables = norm.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), False)
    scale, bias = np.array([0.5, 1.0, 2.0]), np.array([0.1, 0.0, -0.3])
    variables["params"] = {
        "scale": jnp.asarray(scale, jnp.float32),
        "bias": jnp.asarray(bias, jnp.float32),
    }
    state = {"mean": np.zeros(3), "var": np.ones(3), "u": np.zeros(3), "v": np.zeros(3)}
    train = jax.jit(functools.partial(train_replicas, norm))
    clipped = []
    for _ in range(6):
        # Far from where the stream starts, so that the bound on v's decay works.
        x = rng.normal([0, 6, -1], [1, 0.7, 2], (replicas, 3, 4, 4, 3))
        x = x.astype(np.float32)
        dz = (rng.normal(0.5, 1, x.shape) + x).astype(np.float32)
        z, dx, grads, variables = train(variables, x, dz)
        results = [
            reference(state, scale, bias, np.float64(a), np.float64(b), scaled)
            for a, b in zip(x, dz)
        ]
        for index, (ref_z, ref_dx, *_) in enumerate(results):
            np.testing.assert_allclose(z[index], ref_z, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(dx[index], ref_dx, rtol=1e-3, atol=1e-4)
        for name in ("scale", "bias"):
            expected = sum(ref_grads[name] for *_, ref_grads, _, _ in results)
            np.testing.assert_allclose(grads[name], expected, rtol=1e-3, atol=1e-3)
        proposals = [new for *_, new, _ in results]
        state = {k: sum(p[k] for p in proposals) / replicas for k in state}
        stats, errors = variables["batch_stats"], variables["gradient_stats"]
        for name, written in (
            ("mean", stats["streaming_mean"]),
            ("var", stats["streaming_var"]),
            ("u", errors["u"]),
            ("v", errors["v"]),
        ):
            np.testing.assert_allclose(written, state[name], rtol=1e-4, atol=1e-4)
        clipped.append(sum(result[-1] for result in results))
    assert clipped[0] > 0 and clipped[-1] == 0

    x = rng.normal(2, 1, (2, 4, 4, 3))
    y = scale * (x - state["mean"]) / np.sqrt(state["var"] + EPSILON) + bias
    if scaled:
        y /= np.sqrt((y**2).mean((1, 2, 3), keepdims=True) + EPSILON)
    z = norm.apply(variables, jnp.asarray(x, jnp.float32), True)
    np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-4)


def test_replicas_of_a_mesh_propose_as_those_of_vmap_do():
    assert_mesh_equals_vmap(OnlineNorm(False, **FAST))


@pytest.mark.parametrize("scaled", few_quick([True, False], [True]))
@each_degenerate
def test_degenerate_inputs_stay_finite(case, scaled, dtype):
    norm = OnlineNorm(dtype=jnp.dtype(dtype), layer_scaling=scaled)
    assert_finite(norm, DEGENERATE[case])


def test_signal_contract_axis_and_missing_gradient_stats():
    assert_contract(OnlineNorm)


def test_trainer_moves_the_statistics_of_the_backward_pass():
    assert_train_step_moves_gradient_stats(OnlineNorm)


@pytest.mark.parametrize(
    "options",
    [{"alpha_forward": 1.0}, {"alpha_backward": -0.1}, {"layer_scaling": "none"}],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        OnlineNorm(**options)
