import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from tests.reference import kalman as reference

MOMENTUM = 0.9


def move(old, new, momentum):
    return {
        name: momentum * old[name] + (1 - momentum) * stat
        for name, stat in zip(("mean", "var"), new)
    }


def layers(old, x, momentum=MOMENTUM):
    """Two norms, one of them nested, after a step on x ``[N, H, W, C]``."""
    return {
        "norm": move(old, reference.observe(x), momentum),
        "block": {"norm": move(old, reference.observe(3 * x + 1), momentum)},
    }


@pytest.mark.parametrize("replicas", [1, 2, 5])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_replicas_merge_to_the_update_of_the_pooled_batch(replicas, momentum):
    rng = np.random.default_rng(0)
    old = {"mean": rng.normal(size=3), "var": rng.uniform(0.5, 2, 3)}
    centres = rng.normal(size=(replicas, 1, 1, 1, 3))
    x = rng.normal(centres, 1.0, (replicas, 2, 4, 4, 3))
    written = [layers(old, micro_batch, momentum) for micro_batch in x]
    stacked = jax.tree.map(lambda *stats: np.float32(np.stack(stats)), *written)
    merged = jax.jit(kf.merge_running, static_argnums=1)(stacked, momentum)
    pooled = layers(old, x.reshape(-1, 4, 4, 3), momentum)
    chex.assert_trees_all_close(merged, pooled, rtol=1e-4, atol=1e-5)


def test_one_replica_changes_nothing():
    stats = {"norm": {"mean": jnp.arange(3.0), "var": jnp.arange(3.0) + 1}}
    stacked = jax.tree.map(lambda s: s[None], stats)
    chex.assert_trees_all_equal(kf.merge_running(stacked, MOMENTUM), stats)


@pytest.mark.parametrize("momentum", [1.0, -0.1, 1.5])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match=rf"momentum is {momentum}.*\[0, 1\)"):
        kf.merge_running({"mean": jnp.zeros((2, 3))}, momentum)
