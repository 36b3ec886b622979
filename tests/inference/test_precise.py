"""Precise statistics against NumPy's moments of all batches, concatenated."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal
from kalman_flax.inference.precise import precise_statistics

OLD = KalmanState(jnp.array([3.0, -2.0, 1.0]), jnp.array([4.0, 0.5, 9.0]))
NORMS = {"flax": nn.BatchNorm, "batch": kf.baselines.BatchNorm, "kalman": kf.KalmanNorm}


def made_batches(offset, replicas=(2, 3, 5, 1)):
    """Batches ``[replicas, 2, 4, 4, 3]``: channels, and micro-batches, of their own."""
    rng = np.random.default_rng(0)
    scale = np.array([0.5, 2.0, 1.0])
    return [
        np.float32(offset + scale * (rng.normal(size=(r, 2, 4, 4, 3)) + rng.normal()))
        for r in replicas
    ]


def replicated(network, params, batch_stats):
    def forward(x):
        variables = {"params": params, "batch_stats": batch_stats}
        return network.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

    return jax.jit(jax.vmap(forward))


class Net(nn.Module):
    norm: nn.Module

    @nn.compact
    def __call__(self, x):
        x = self.norm(False, name="first")(x)
        return self.norm(False, name="second")(nn.Dense(4, name="dense")(x))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("name", NORMS)
def test_moments_of_all_batches_concatenated(name, offset, momentum):
    norm = functools.partial(NORMS[name], momentum=momentum)
    if name == "flax":  # whose default is 0 for data at 1e4 +- 1
        norm = functools.partial(norm, use_fast_variance=False)
    network = Net(norm)
    batches = made_batches(offset)
    variables = network.init(jax.random.key(0), batches[0][0])
    stats = variables["batch_stats"]
    stats["first"] = {"mean": offset + OLD.mean, "var": OLD.var}
    forward = replicated(network, variables["params"], stats)
    result = precise_statistics(forward, stats, iter(batches), momentum)

    x = np.concatenate(batches).astype(np.float64)
    over = (0, 1, 2, 3)
    each = {"axis": (1, 2, 3), "keepdims": True}  # a replica normalises by itself
    z = (x - x.mean(**each)) / np.sqrt(x.var(**each) + 1e-5)
    dense = variables["params"]["dense"]
    z = z @ np.asarray(dense["kernel"], np.float64) + dense["bias"]
    # A mean near 1e4 is rounded to 5e-4; undoing an average of 0.9 makes that 5e-3.
    rtol = 3e-3 if offset else 1e-4
    got = result["first"]
    np.testing.assert_allclose(got["mean"], x.mean(over), rtol=1e-6, atol=2e-5)
    np.testing.assert_allclose(got["var"], x.var(over), rtol=rtol)
    got = result["second"]
    np.testing.assert_allclose(got["mean"], z.mean(over), atol=3e-3 if offset else 1e-5)
    np.testing.assert_allclose(got["var"], z.var(over), rtol=rtol)


def test_statistics_of_a_filter_are_the_filtered_ones():
    class Filtered(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = kf.KalmanNorm(False, momentum=0.9, gain=0.3, learn_gain=None)
            return norm(Signal(x, KalmanState(0.5, 2.0))).value

    batches = made_batches(0.0)
    variables = Filtered().init(jax.random.key(0), batches[0][0])
    stats = variables["batch_stats"]
    forward = replicated(Filtered(), variables["params"], stats)
    result = precise_statistics(forward, stats, batches, 0.9)["KalmanNorm_0"]
    x = np.concatenate(batches).astype(np.float64)
    mean, var = x.mean((1, 2, 3)), x.var((1, 2, 3))
    var = 0.7 * 2.0 + 0.3 * var + 0.21 * (mean - 0.5) ** 2
    mean = 0.7 * 0.5 + 0.3 * mean
    np.testing.assert_allclose(result["mean"], mean.mean(0), rtol=1e-5)
    np.testing.assert_allclose(result["var"], var.mean(0) + mean.var(0), rtol=1e-5)


def test_only_pairs_change_and_the_training_pass_starts_from_the_old_ones():
    """As batch renorm does, the layer below normalises in training by what it kept."""
    old = {
        "layer": {"mean": OLD.mean, "var": OLD.var, "step": jnp.float32(7.0)},
        "alone": {"var": OLD.var},
    }

    def forward(x):
        mean = x.mean((1, 2, 3)) + old["layer"]["mean"]
        var = x.var((1, 2, 3)) + old["layer"]["step"]
        kept = jax.tree.map(lambda s: 0.5 * s + jnp.zeros((len(x), *s.shape)), old)
        kept["layer"]["mean"] += 0.5 * mean
        kept["layer"]["var"] += 0.5 * var
        return kept

    batches = made_batches(0.0)
    result = precise_statistics(forward, old, batches, 0.5)
    assert result["layer"]["step"] == 7.0
    chex.assert_trees_all_equal(result["alone"], old["alone"])
    x = np.concatenate(batches)
    layer, over = result["layer"], (0, 1, 2, 3)
    np.testing.assert_allclose(layer["mean"], x.mean(over) + OLD.mean, rtol=1e-5)
    np.testing.assert_allclose(layer["var"], x.var(over) + 7.0, rtol=1e-5)


def test_nothing_to_compute_is_an_error():
    stats = {"norm": OLD._asdict()}
    with pytest.raises(ValueError, match="no batches"):
        precise_statistics(lambda x: stats, stats, [], 0.9)
    with pytest.raises(ValueError, match="no running mean and var"):
        precise_statistics(lambda x: {}, {}, [1], 0.9)
    with pytest.raises(ValueError, match="expected a number in"):
        precise_statistics(lambda x: stats, stats, [1], 1.0)
