"""What GPUs and TPUs compute: as much as can be tried on a CPU."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax._filter.observe import observe_about as about
from tests.reference import kalman as reference
from tests.train.tiny import OneStage


@pytest.fixture
def elsewhere(monkeypatch):
    """Has what is traced take the way of GPUs and TPUs."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, default, **_: default(*args)
    )


@pytest.mark.parametrize("offset", [2.0, 1e4])
@pytest.mark.parametrize("wrong_by", [0.0, 0.3, 3.0])
def test_moments_about_a_guess(elsewhere, offset, wrong_by):
    x = np.random.default_rng(0).normal(offset, 1.0, (4, 8, 8, 6)).astype(np.float32)
    truth = reference.observe(x, "batch")
    guess = jnp.float32(truth[0] + wrong_by)
    chex.assert_trees_all_close(tuple(about(x, guess)), truth, rtol=1e-4, atol=1e-5)


def test_the_guess_changes_neither_moments_nor_gradients(elsewhere):
    x = np.random.default_rng(0).normal(1.0, 2.0, (4, 5, 3)).astype(np.float32)

    def score(mean, var):
        return jnp.sum(mean * jnp.arange(3.0) + jnp.square(var))

    given = jax.grad(lambda x: score(*about(x, jnp.ones(3))))(x)
    expected = jax.grad(lambda x: score(*kf.filter.observe(x)))(x)
    chex.assert_trees_all_close(given, expected, rtol=1e-5)
    _, none = jax.jvp(lambda guess: about(x, guess), *[(jnp.ones(3),)] * 2)
    chex.assert_trees_all_equal(none, kf.KalmanState(jnp.zeros(3), jnp.zeros(3)))


@pytest.mark.parametrize(
    "options, exact",
    [
        # Rounding loses the variance that is observed, but not that which is used.
        ({"gain": 0.02}, "filtered"),
        ({"gain": 0.99}, "filtered"),
        ({"gain": 0.99, "decay_steps": 10}, "filtered"),
        # It would be lost here, so that two passes are taken.
        ({"gain": 0.995}, "observed"),
        ({"gain": 0.1, "learn_gain": "scalar"}, "observed"),
        ({"gain": 0.1, "rule": "paper"}, "observed"),
        ({"gain": 0.1, "outlier_ratio": 100.0}, "observed"),
        ({"gain": 1.0}, "observed"),
    ],
    ids=str,
)
def test_a_far_prediction_loses_no_variance(elsewhere, options, exact):
    x = 1e4 + jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
    norm = kf.KalmanNorm(use_running_average=False, **options)
    signal = kf.Signal(x, kf.KalmanState(0.0, 1.0))
    variables = norm.init(jax.random.key(0), signal)
    _, written = norm.apply(variables, signal, mutable=["batch_stats", "intermediates"])
    mean, var = reference.observe(x, "batch")
    if exact == "filtered":
        q = options["gain"]
        var = (1 - q) + q * var + (1 - q) * q * mean**2
    state = written["intermediates"][exact]
    np.testing.assert_allclose(state.var, var, rtol=1e-4)


def test_moments_about_a_guess_where_a_mask_says_so(elsewhere):
    """Values, gradients, and NaN beneath the mask; channel 2 is masked out."""
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 2.0, (4, 5, 3)).astype(np.float32)
    mask = rng.uniform(size=(4, 5, 3)) < [0.7, 0.3, 0.0]
    flat, counts = x.reshape(-1, 3), mask.reshape(-1, 3)
    chosen = [np.float64(flat[counts[:, c], c]) for c in range(2)]
    mean, var = ([*(f(v) for v in chosen), 0.0] for f in (np.mean, np.var))
    hidden = jnp.where(mask, x, jnp.nan)

    def found(x):
        return tuple(about(x, jnp.full(3, 0.5), mask=mask))

    chex.assert_trees_all_close(
        found(hidden), (np.array(mean), np.array(var)), rtol=1e-4
    )
    count = counts.sum(0)
    slope = np.where(mask, (1 + 2 * (x - mean)) / np.maximum(count, 1), 0)
    chex.assert_trees_all_close(
        jax.grad(lambda x: sum(map(jnp.sum, found(x))))(hidden),
        slope,
        rtol=1e-4,
        atol=1e-6,
    )


def test_a_constant_has_no_variance(elsewhere):
    x = jnp.full((64, 7), 0.1)
    near = about(x, jnp.full(7, 0.3)).var
    chex.assert_trees_all_close(near, jnp.zeros(7), atol=1e-6 * 0.2**2)
    assert jnp.all(about(x, jnp.full(7, 1e3)).var >= 0.0)


def test_a_prediction_through_groups(elsewhere):
    rng = np.random.default_rng(0)
    kernel = rng.normal(0.2, 0.5, (3, 2, 2, 6)).astype(np.float32)
    mean, var = rng.normal(size=(5, 4)), rng.uniform(0.2, 2, (5, 4))
    state = kf.filter.predict_conv(
        kf.KalmanState(mean, var), kernel, (5, 6), feature_group_count=2
    )
    for i in range(5):
        expected = reference.conv(
            mean[i], var[i], kernel, (5, 6), feature_group_count=2
        )
        chex.assert_trees_all_close((state.mean[i], state.var[i]), expected, rtol=1e-4)


def updates():
    """A gradient of a small network, and the statistics that it wrote."""
    norm = kf.normalization("kalman_wc")._asdict()
    network = OneStage(num_classes=10, blocks_per_stage=2, width=4, **norm)
    images = jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 3))
    variables = jax.jit(lambda: network.init(jax.random.key(1), images[0], True))()

    def loss(params):
        def forward(x):
            return network.apply(
                variables | {"params": params}, x, False, mutable=["batch_stats"]
            )

        logits, written = jax.vmap(forward)(images)
        return jnp.mean(jnp.square(logits - 1.0)), written

    return loss, variables["params"]


def test_a_network_learns_the_same_there(elsewhere, monkeypatch):
    loss, params = updates()
    there = jax.jit(jax.grad(loss, has_aux=True))(params)
    monkeypatch.undo()
    loss, params = updates()
    here = jax.jit(jax.grad(loss, has_aux=True))(params)
    chex.assert_trees_all_close(there, here, rtol=1e-3, atol=1e-5)


def test_only_the_cpu_gets_barriers():
    loss, params = updates()
    traced = jax.jit(jax.grad(loss, has_aux=True)).trace(params)

    def lowered(platform):
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "optimization_barrier" in lowered("cpu")
    for platform in ("cuda", "tpu"):
        assert "optimization_barrier" not in lowered(platform)
