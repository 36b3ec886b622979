"""Batch Renormalization against its equations in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kalman_flax import KalmanState, Signal
from kalman_flax.baselines import BatchNorm
from kalman_flax.baselines.batch_renorm import BatchRenorm

KEY = jax.random.key(0)
EPSILON, MOMENTUM = 1e-3, 0.8
RAMP = {"warmup_steps": 2, "r_steps": 6, "d_steps": 4, "r_max": 1.5, "d_max": 0.4}
#: Bounds of r and d at steps 0, 1, ...: 1 and 0 to the end of the warm-up.
R_MAX = (1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.5)
D_MAX = (0.0, 0.0, 0.4 / 3, 0.8 / 3, 0.4, 0.4, 0.4, 0.4)
LOOSE = {"warmup_steps": 0, "r_steps": 0, "d_steps": 0, "r_max": 1e9, "d_max": 1e9}
AXES = (0, 1, 2)


def make(**options):
    return BatchRenorm(False, momentum=MOMENTUM, epsilon=EPSILON, **options)


def micro_batches():
    """Eight, of moments that differ much, so that the bounds are reached and not."""
    x = np.random.default_rng(0).normal(size=(8, 3, 2, 2, 4))
    shift, stretch = np.random.default_rng(1).normal(size=(2, 8, 1, 1, 1, 4))
    return 0.4 * shift + x * np.exp(0.6 * stretch)


def correction(x, mean, var, r_max, d_max):
    std_b, std = np.sqrt(x.var(AXES) + EPSILON), np.sqrt(var + EPSILON)
    r = np.clip(std_b / std, 1 / r_max, r_max)
    return r, np.clip((x.mean(AXES) - mean) / std, -d_max, d_max)


def test_recursion_and_ramp():
    norm = make(**RAMP)
    batches = micro_batches()
    variables = norm.init(KEY, jnp.asarray(batches[0], jnp.float32))
    scale, bias = np.linspace(0.5, 2, 4), np.linspace(-1, 1, 4)
    variables["params"] = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    apply = jax.jit(functools.partial(norm.apply, mutable=["batch_stats"]))
    mean, var = np.zeros(4), np.ones(4)
    clipped = []
    for step, x in enumerate(batches):
        r, d = correction(x, mean, var, R_MAX[step], D_MAX[step])
        clipped += list(np.abs(d) == D_MAX[step]) if step > 1 else []
        x_hat = (x - x.mean(AXES)) / np.sqrt(x.var(AXES) + EPSILON) * r + d
        y, written = apply(variables, Signal(jnp.asarray(x, jnp.float32)))
        expected = scale * x_hat + bias
        np.testing.assert_allclose(y.value, expected, rtol=1e-4, atol=1e-5)
        # What it hands on are the moments of what came out, whatever r and d, but for
        # var / (var + epsilon), here 0.99 or more.
        np.testing.assert_allclose(y.state.mean, expected.mean(AXES), atol=1e-5)
        np.testing.assert_allclose(y.state.var, expected.var(AXES), rtol=1e-2)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * x.mean(AXES)
        var = MOMENTUM * var + (1 - MOMENTUM) * x.var(AXES)
        stats = written["batch_stats"]
        np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats["var"], var, rtol=1e-5)
        assert stats["steps"] == step + 1
        variables = variables | written
    assert 0 < sum(clipped) < len(clipped)

    infer = BatchRenorm(True, epsilon=EPSILON).apply(variables, Signal(x))
    std = np.sqrt(var + EPSILON)
    expected = scale * (x - mean) / std + bias
    np.testing.assert_allclose(infer.value, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(infer.state.mean, bias)
    np.testing.assert_allclose(infer.state.var, scale**2, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"r_max": 1.0, "d_max": 0.0}, LOOSE])
def test_warm_up_is_batch_norm_and_loose_bounds_are_inference(options):
    x = jnp.asarray(micro_batches()[3], jnp.float32)
    norm = make(**options)
    stats = {"mean": jnp.arange(4.0), "var": jnp.arange(1.0, 5.0)}
    params = {"scale": jnp.full(4, 2.0), "bias": jnp.full(4, 3.0)}
    loose = options is LOOSE
    plain = BatchNorm(use_running_average=loose, momentum=MOMENTUM, epsilon=EPSILON)
    expected = plain.apply(
        {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
    )
    stats = stats | {"steps": jnp.float32(0.0)}
    y, written = norm.apply(
        {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(y, expected[0], rtol=1e-4, atol=1e-5)
    if not loose:
        del written["batch_stats"]["steps"]
        chex.assert_trees_all_close(written, expected[1], rtol=1e-6)


@pytest.mark.parametrize("step", [2, 5])
def test_r_and_d_are_constants_to_the_gradient(step):
    x = micro_batches()[step]
    mean, var = np.full(4, 0.3), np.linspace(0.5, 2, 4)
    weights = np.random.default_rng(2).normal(size=x.shape)
    r, d = correction(x, mean, var, R_MAX[step], D_MAX[step])

    def loss(x):
        x_hat = (x - x.mean(AXES)) / np.sqrt(x.var(AXES) + EPSILON) * r + d
        return np.sum(weights * np.sin(x_hat))

    direction = np.random.default_rng(3).normal(size=x.shape)
    h = 1e-6 * direction
    expected = (loss(x + h) - loss(x - h)) / 2e-6

    norm = make(**RAMP)
    stats = {"mean": mean, "var": var, "steps": np.float32(step)}
    variables = norm.init(KEY, x) | {"batch_stats": stats}

    def ours(x):
        y, _ = norm.apply(variables, x, mutable=["batch_stats"])
        return jnp.sum(weights * jnp.sin(y))

    gradient = jax.grad(ours)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(np.sum(direction * gradient), expected, rtol=1e-3)


def test_replicas_that_share_statistics_are_one_micro_batch():
    x = jnp.asarray(micro_batches()[:2], jnp.float32)
    mask = jnp.arange(8).reshape(2, 1, 2, 2, 1) % 3 > 0
    variables = make(**LOOSE).init(KEY, x[0])

    def run(norm, x, mask):
        return norm.apply(variables, x, mask=mask, mutable=["batch_stats"])

    shared = functools.partial(run, make(**LOOSE, axis_name="replicas"))
    y, written = jax.vmap(shared, axis_name="replicas")(x, mask)
    together = x.reshape(6, 2, 2, 4)
    expected = run(
        make(**LOOSE), together, jnp.repeat(mask, 3, axis=1).reshape(6, 2, 2, 1)
    )
    np.testing.assert_allclose(
        y.reshape(together.shape), expected[0], rtol=1e-4, atol=1e-5
    )
    first = jax.tree.map(lambda v: v[0], written)
    chex.assert_trees_all_close(first, expected[1], rtol=1e-5)


@pytest.mark.parametrize("options", [{}, LOOSE])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4, 1e-6])
def test_constant_inputs_are_finite(value, dtype, options):
    x = jnp.full((1, 1, 1, 3), value, dtype)
    norm = BatchRenorm(False, dtype=dtype, **options)
    variables = norm.init(KEY, x)

    def loss(x):
        y, written = norm.apply(variables, x, mutable=["batch_stats"])
        assert y.dtype == dtype
        return jnp.sum(y.astype(jnp.float32)), written

    result = jax.value_and_grad(loss, has_aux=True)(x)
    chex.assert_tree_all_finite(result)


def test_axis_dtype_and_plain_arrays():
    x = jnp.asarray(micro_batches()[0], jnp.float32)
    norm = BatchRenorm(False, use_scale=False, use_bias=False)
    variables = norm.init(KEY, x)
    assert set(variables) == {"batch_stats"}
    y, _ = norm.apply(variables, x, mutable=["batch_stats"])
    first = BatchRenorm(False, axis=1, use_scale=False, use_bias=False)
    moved, _ = first.apply(variables, jnp.moveaxis(x, -1, 1), mutable=["batch_stats"])
    np.testing.assert_allclose(jnp.moveaxis(moved, 1, -1), y, atol=1e-6)
    signal = Signal(x, KalmanState(0.5, 2.0))
    filtered = norm.apply(variables, signal, method="filter")
    chex.assert_trees_all_equal(filtered.signal, signal)
    z, _ = norm.apply(variables, filtered, method="normalize", mutable=["batch_stats"])
    np.testing.assert_allclose(z.value, y, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r_max": 0.5}, "r_max is 0.5"),
        ({"d_max": -1.0}, "d_max is -1.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"r_steps": 100}, "r_steps 100"),
        ({"d_steps": 100}, "d_steps 100"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        BatchRenorm(**options)
