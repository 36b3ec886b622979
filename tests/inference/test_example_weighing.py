"""Example weighing against the paper's equation, in float64 by its second moments."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal
from kalman_flax.inference.example_weighing import weigh_example

NORMS = {"flax": nn.BatchNorm, "batch": kf.baselines.BatchNorm, "kalman": kf.KalmanNorm}


def made(norm, x):
    """Variables as training might leave them."""
    variables = norm.init(jax.random.key(0), x)
    mean, var = np.float32([[2.0, -1.0, 0.5], [4.0, 0.5, 1.5]])
    return {
        "params": {
            **variables["params"],
            "scale": jnp.array([1.0, -2.0, 0.5]),
            "bias": jnp.array([0.1, 0.0, -3.0]),
        },
        "batch_stats": {"mean": jnp.asarray(mean), "var": jnp.asarray(var)},
    }


def weighed(norm, variables, x, weight, **options):
    with weigh_example(weight):
        return norm.apply(variables, x, **options)


def expected(variables, x, weight, epsilon=1e-5):
    x = np.asarray(x, np.float64)
    running, params = (
        {name: np.asarray(v, np.float64) for name, v in variables[key].items()}
        for key in ("batch_stats", "params")
    )
    over = {"axis": tuple(range(1, x.ndim - 1)), "keepdims": True}
    square = running["var"] + running["mean"] ** 2
    mean = (1 - weight) * running["mean"] + weight * x.mean(**over)
    square = (1 - weight) * square + weight * (x**2).mean(**over)
    z = (x - mean) / np.sqrt(square - mean**2 + epsilon)
    return params["scale"] * z + params["bias"]


@pytest.fixture
def x():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(4, 5, 6, 3)) + rng.normal(size=(4, 1, 1, 3)))


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("shape", [(4, 5, 6, 3), (4, 3)])
@pytest.mark.parametrize("name", NORMS)
def test_equation_of_the_paper(name, shape, axis, x):
    x = x[:, :1, :1].reshape(shape) if len(shape) == 2 else x
    norm = NORMS[name](True, axis=axis)
    variables = made(norm, jnp.moveaxis(x, -1, axis))
    for weight in (0.1, 0.6):
        y = weighed(norm, variables, jnp.moveaxis(x, -1, axis), weight)
        want = expected(variables, x, weight)
        np.testing.assert_allclose(jnp.moveaxis(y, axis, -1), want, atol=3e-5)


@pytest.mark.parametrize("name", NORMS)
def test_ends_are_plain_inference_and_instance_norm(name, x):
    norm = NORMS[name](True)
    variables = made(norm, x)
    plain = norm.apply(variables, x)
    np.testing.assert_allclose(weighed(norm, variables, x, 0.0), plain, atol=1e-6)
    instance = nn.InstanceNorm(epsilon=1e-5, use_fast_variance=False)
    params = {key: variables["params"][key] for key in ("scale", "bias")}
    y = weighed(norm, variables, x, 1.0)
    np.testing.assert_allclose(y, instance.apply({"params": params}, x), atol=1e-5)
    np.testing.assert_array_equal(norm.apply(variables, x), plain)  # it ended


@pytest.mark.parametrize("name", ["batch", "kalman"])
def test_signals_large_values_and_half_precision(name, x):
    norm = NORMS[name](True, dtype=jnp.bfloat16)
    variables = made(norm, x)
    variables["batch_stats"]["mean"] += 1e4
    y = weighed(norm, variables, Signal(x + 1e4, KalmanState(0.0, 1.0)), 0.3)
    assert y.state is None
    assert y.value.dtype == jnp.bfloat16
    want = expected(variables, x + 1e4, 0.3)
    np.testing.assert_allclose(y.value.astype(jnp.float32), want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "name, scan",
    [
        ("batch", True),
        ("kalman", False),
        pytest.param("batch", False, marks=pytest.mark.slow),
        pytest.param("kalman", True, marks=pytest.mark.slow),
    ],
)
def test_a_network_sees_each_image_by_itself(name, scan):
    """Through filter and normalize apart, shortcuts, sums, a scan; `weight` traced."""
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    network = kf.models.ResNet(
        5, 3 if scan else 1, width=2, norm=NORMS[name], scan=scan
    )
    init = functools.partial(network.init, use_running_average=True)
    variables = jax.jit(init)(jax.random.key(1), images)

    def logits(images, weight):
        with weigh_example(weight):
            return network.apply(variables, images, use_running_average=True)

    logits = jax.jit(logits)
    together = logits(images, 0.4)
    alone = jnp.concatenate([logits(image[None], 0.4) for image in images])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    infer = jax.jit(functools.partial(network.apply, use_running_average=True))
    plain = infer(variables, images)
    np.testing.assert_allclose(logits(images, 0.0), plain, rtol=1e-4, atol=1e-5)
    assert not np.allclose(together, plain, rtol=0.01)


def test_other_normalisers_are_left_alone(x):
    norm = kf.baselines.GroupNorm(num_groups=3)
    variables = norm.init(jax.random.key(0), x)
    plain = norm.apply(variables, x)
    chex.assert_trees_all_equal(weighed(norm, variables, x, 0.5), plain)


def test_bad_weights_and_training_passes(x):
    for weight in (-0.1, 1.5, float("nan")):
        with pytest.raises(
            ValueError, match=r"weight is .*expected a number in \[0, 1"
        ):
            weighed(nn.BatchNorm(True), {}, x, weight)
    for norm in (kf.baselines.BatchNorm(), kf.KalmanNorm()):
        variables = norm.init(jax.random.key(0), x, use_running_average=True)
        with pytest.raises(ValueError, match="this is a training pass"):
            weighed(norm, variables, x, 0.5, use_running_average=False)
