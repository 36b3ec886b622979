"""The correction of predictions, against moments of all that was observed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kalman_flax import KalmanState
from kalman_flax.filter import (
    correct,
    merged_corrections,
    uncorrected,
    update_correction,
)

RNG = np.random.default_rng(0)
STEPS, REPLICAS, C = 4, 3, 5
# Predictions that are far off, and differ from step to step; one predicts no variance.
PREDICTED = RNG.normal(3.0, 1.0, (STEPS, C)), RNG.uniform(0.1, 9.0, (STEPS, C))
PREDICTED[1][:, 0] = 0.0
OBSERVED = (
    RNG.normal(0.0, 1.0, (STEPS, REPLICAS, C)),
    RNG.uniform(0.1, 4.0, (STEPS, REPLICAS, C)),
)


def state(mean, var):
    return KalmanState(jnp.asarray(mean, jnp.float32), jnp.asarray(var, jnp.float32))


def first():
    return state(*(s[0] for s in PREDICTED)), state(*(s[0, 0] for s in OBSERVED))


def expected(momentum):
    """Mean and variance of all observations, in units of what was predicted for each,
    weighed by their age."""
    terms = []
    for step in range(STEPS):
        unit = np.sqrt(PREDICTED[1][step] + 1e-6)
        for replica in range(REPLICAS):
            mean = (OBSERVED[0][step, replica] - PREDICTED[0][step]) / unit
            var = OBSERVED[1][step, replica] / unit**2
            terms.append((momentum ** (STEPS - 1 - step), mean, var))
    total = sum(weight for weight, *_ in terms)
    offset = sum(weight * mean for weight, mean, _ in terms) / total
    ratio = sum(w * (var + (mean - offset) ** 2) for w, mean, var in terms) / total
    return offset, ratio, np.full(C, 1.0 - momentum**STEPS)


@pytest.mark.parametrize("momentum", [0.0, 0.7, 0.99])
def test_moments_of_all_that_was_observed(momentum):
    @jax.jit
    def step(correction, predicted, observed):
        def learn(observed):
            return update_correction(correction, predicted, observed, momentum)

        return merged_corrections(jax.vmap(learn)(observed))

    correction = uncorrected(C)
    for t in range(STEPS):
        seen = state(OBSERVED[0][t], OBSERVED[1][t])
        predicted = state(PREDICTED[0][t], PREDICTED[1][t])
        correction = step(correction, predicted, seen)
    chex.assert_trees_all_close(
        tuple(correction), expected(momentum), rtol=1e-4, atol=1e-5
    )


def test_a_correction_of_one_observation_gives_it_back():
    predicted, observed = (
        state(*(s[0] for s in PREDICTED)),
        state(*(s[0, 0] for s in OBSERVED)),
    )
    correction = update_correction(uncorrected(C), predicted, observed, 0.0)
    chex.assert_trees_all_close(correct(predicted, correction), observed, rtol=1e-5)
    of_var = correct(predicted, correction, "var")
    chex.assert_trees_all_close(
        of_var, KalmanState(predicted.mean, observed.var), rtol=1e-5
    )
    unchanged = correct(predicted, uncorrected(C))
    chex.assert_trees_all_close(unchanged, predicted, atol=2e-6)


def test_a_correction_never_moves_with_momentum_one():
    predicted, observed = (
        state(*(s[0] for s in PREDICTED)),
        state(*(s[0, 0] for s in OBSERVED)),
    )
    kept = update_correction(uncorrected(C), predicted, observed, 1.0)
    chex.assert_trees_all_equal(kept, uncorrected(C))


def test_gradients_flow_through_the_prediction_alone():
    predicted, observed = (
        state(*(s[0] for s in PREDICTED)),
        state(*(s[0, 0] for s in OBSERVED)),
    )
    correction = update_correction(uncorrected(C), predicted, observed, 0.0)

    def loss(predicted, observed, correction):
        learned = update_correction(correction, predicted, observed, 0.9)
        corrected = correct(predicted, correction)
        return sum(map(jnp.sum, (*learned, *corrected)))

    of_predicted, *others = jax.grad(loss, (0, 1, 2))(predicted, observed, correction)
    unit = jnp.sqrt(predicted.var + 1e-6)
    slope = 0.5 * correction.offset / unit + correction.ratio
    chex.assert_trees_all_close(
        of_predicted, KalmanState(jnp.ones(C), slope), rtol=1e-5
    )
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(others))
