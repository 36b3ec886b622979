import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import kalman_flax as kf
from tests.reference import kalman as reference
from tests.reference.statistics import assert_moments

each_rule = pytest.mark.parametrize("rule", ["paper", "mixture"])


def draw(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return kf.KalmanState(
        np.float32(rng.normal(size=shape)), np.float32(rng.uniform(0.2, 2, shape))
    )


@each_rule
@pytest.mark.parametrize(
    "gain", [0.1, np.float32([0.0, 0.25, 0.5, 1.0])], ids=["scalar", "per-channel"]
)
@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=["C", "NC"])
def test_update_against_numpy(rule, gain, shape):
    predicted, observed = draw(4), draw(*shape, seed=1)
    state = jax.jit(kf.filter.update, static_argnames="rule")(
        predicted, observed, gain, rule=rule
    )
    expected = reference.update(predicted, observed, gain, rule)
    chex.assert_trees_all_close(tuple(state), expected, rtol=1e-5)


def test_mixture_rule_is_the_default_and_describes_a_sampled_mixture():
    predicted, observed = draw(4), draw(4, seed=1)
    gain = np.float32([0.1, 0.3, 0.5, 0.9])
    rng = np.random.default_rng(2)
    chosen, other = (
        rng.normal(s.mean, np.sqrt(s.var), (200_000, 4)) for s in (observed, predicted)
    )
    samples = np.where(rng.random(chosen.shape) < gain, chosen, other)
    assert_moments(samples, *kf.filter.update(predicted, observed, gain))


@each_rule
def test_gain_of_one_is_the_observation_and_of_zero_the_prediction(rule):
    predicted, observed = draw(4), draw(4, seed=1)
    chex.assert_trees_all_equal(
        kf.filter.update(predicted, observed, 1.0, rule), observed
    )
    chex.assert_trees_all_equal(
        kf.filter.update(predicted, observed, 0.0, rule), predicted
    )


def test_update_at_an_offset_of_1e4():
    predicted, observed = (draw(4, seed=i) for i in range(2))
    expected = kf.filter.update(predicted, observed, 0.3)
    predicted, observed = (
        kf.KalmanState(s.mean + np.float32(1e4), s.var) for s in (predicted, observed)
    )
    state = kf.filter.update(predicted, observed, 0.3)
    chex.assert_trees_all_close(state.var, expected.var, rtol=5e-3)


@each_rule
def test_numerical_gradients_of_the_update(rule):
    @jax.jit
    def loss(predicted, observed, gain):
        predicted, observed = kf.KalmanState(*predicted), kf.KalmanState(*observed)
        mean, var = kf.filter.update(predicted, observed, gain, rule)
        return jnp.sum(jnp.sin(mean) * jnp.log(var))

    states = tuple(draw(4)), tuple(draw(4, seed=1))
    gain = np.float32([0.2, 0.4, 0.6, 0.8])
    check_grads(
        loss, (*states, gain), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=3e-3
    )


@pytest.mark.parametrize("factor", [60, 140])
def test_reject_outlier_by_the_mean_ratio_of_variances(factor):
    """Ratios 0.5 and 1.5 times the factor: their mean decides for both channels."""
    observed = draw(2)
    ratio = factor * np.float32([0.5, 1.5])
    predicted = kf.KalmanState(observed.mean + 1, observed.var * ratio)
    kept = kf.filter.reject_outlier(predicted, observed, 100.0)
    chex.assert_trees_all_equal(kept, predicted if factor < 100 else observed)


@pytest.mark.parametrize("predicted_var", [0.0, 1.0])
def test_reject_outlier_without_observed_variance(predicted_var):
    observed = kf.KalmanState(jnp.ones(3), jnp.zeros(3))

    def guarded(var):
        predicted = kf.KalmanState(jnp.zeros(3), var)
        return kf.filter.reject_outlier(predicted, observed, 100.0)

    var = jnp.full(3, predicted_var)
    chex.assert_trees_all_equal(guarded(var), observed)
    chex.assert_tree_all_finite(jax.grad(lambda v: jnp.sum(guarded(v).var))(var))


def test_reject_outlier_example_by_example():
    observed = draw(2, 3)
    predicted = kf.KalmanState(np.zeros(3, np.float32), 50 * observed.var[0])
    small = kf.KalmanState(observed.mean, observed.var[:1] * np.float32([[1], [0.1]]))
    mean, var = kf.filter.reject_outlier(predicted, small, 100.0)
    chex.assert_trees_all_equal((mean[0], var[0]), tuple(predicted))
    chex.assert_trees_all_equal((mean[1], var[1]), (small.mean[1], small.var[1]))


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("state_shape", [(5,), (3, 5)], ids=["C", "NC"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalize_against_numpy(axis, state_shape, dtype, offset):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(offset + 2, 3, (3, 4, 6, 5)), dtype)
    mean, var = draw(*state_shape)
    state = kf.KalmanState(mean + np.float32(offset), var)
    scale, bias = np.float32(rng.normal(size=(2, 5)))
    y = kf.filter.normalize(
        jnp.moveaxis(x, -1, axis), state, scale, bias, epsilon=0.1, axis=axis
    )
    chex.assert_type(y, jnp.float32)
    expected = reference.normalize(np.float32(x), *state, scale, bias, epsilon=0.1)
    chex.assert_trees_all_close(
        jnp.moveaxis(y, axis, -1), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("over", ["batch", "instance"])
def test_normalized_state_is_what_normalize_puts_out(offset, over):
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(offset, rng.uniform(0.5, 2, 5), (3, 4, 6, 5)))
    scale, bias = np.float32(rng.normal(size=(2, 5)))
    state = kf.filter.observe(x, over)
    y = kf.filter.normalize(x, state, scale, bias, epsilon=1e-6)
    expected = reference.observe(y, over)
    promised = kf.filter.normalized_state(scale, bias)
    tolerance = 2e-2 if offset else 1e-5  # float32 at 1e4 has steps of 1e-3
    for stat, measured in zip(promised, expected):
        np.testing.assert_allclose(
            np.broadcast_to(stat, measured.shape), measured, tolerance, tolerance
        )


def test_floats_as_state_scale_and_bias():
    x = draw(2, 3, 4, 5).mean
    y = kf.filter.normalize(x, kf.KalmanState(0.5, 4.0), 3.0, -1.0, epsilon=0.0)
    chex.assert_trees_all_close(y, 3 * (x - 0.5) / 2 - 1, rtol=1e-5, atol=1e-6)


def test_integers_are_normalised_and_have_no_gradient():
    """As in `nn.BatchNorm`: scale and bias have one."""
    x = jnp.array([[1, 2], [3, 6]], jnp.uint8)

    def loss(scale, x):
        return jnp.sum(kf.filter.normalize(x, kf.filter.observe(x), scale) ** 2)

    actual, expected = (jax.grad(loss)(jnp.ones(2), v) for v in (x, jnp.float32(x)))
    chex.assert_trees_all_close(actual, expected)


def test_normalize_without_variance_has_finite_gradients():
    def loss(x, epsilon=1e-5):
        return jnp.sum(
            jnp.sin(kf.filter.normalize(x, kf.filter.observe(x), epsilon=epsilon))
        )

    x = jnp.ones((2, 3, 3, 4))
    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(loss))(x))
    x = draw(2, 3, 4).mean
    check_grads(
        jax.jit(loss), (x,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=3e-3
    )


def test_derivatives_of_both_orders_are_those_of_the_plain_formula():
    """`observe` and `normalize` have rules of their own, forward mode included."""

    def ours(x, scale, bias):
        return jnp.sum(
            jnp.sin(kf.filter.normalize(x, kf.filter.observe(x), scale, bias))
        )

    def plain(x, scale, bias):
        mean, var = jnp.mean(x, (0, 1)), jnp.var(x, (0, 1))
        return jnp.sum(jnp.sin((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias))

    arguments = (draw(3, 2, 2).mean, *draw(2, seed=1))
    for derive in (jax.grad, jax.hessian):
        actual, expected = (
            jax.jit(derive(loss, argnums=(0, 1, 2)))(*arguments)
            for loss in (ours, plain)
        )
        chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_state_is_the_carry_of_a_scan():
    """Three steps of predict and update, as a loop and as one scan."""
    kernels = np.float32(np.random.default_rng(1).normal(size=(3, 4, 4)))
    observed = draw(3, 4, seed=1)

    def step(state, inputs):
        kernel, seen = inputs
        state = kf.filter.predict_relu(kf.filter.predict_dense(state, kernel))
        return kf.filter.update(state, seen, 0.2), None

    start = draw(4)
    scanned, _ = jax.lax.scan(step, start, (kernels, observed))
    looped = start
    for i in range(3):
        seen = jax.tree.map(lambda s, i=i: s[i], observed)
        looped, _ = step(looped, (kernels[i], seen))
    chex.assert_trees_all_close(scanned, looped, rtol=1e-5)


def test_unknown_rule():
    with pytest.raises(ValueError, match=r"'exact'; expected one of .*mixture"):
        kf.filter.update(draw(4), draw(4), 0.5, "exact")
