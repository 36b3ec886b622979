"""Runs that differ in seed, learning rate and schedule alone are one program."""

import jax
import numpy as np
import pytest
from jax._src import compilation_cache

from tests.train.common import batch, tiny_config
from train.engine.experiment import build

HITS = "/jax/compilation_cache/cache_hits"
MISSES = "/jax/compilation_cache/cache_misses"


@pytest.fixture
def seen(tmp_path):
    """What the compilation cache, empty at first, is asked for."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    events = []
    jax.config.update(names[0], str(tmp_path))
    jax.config.update(names[1], 0)
    compilation_cache.reset_cache()
    jax.monitoring.register_event_listener(listen := lambda e, **_: events.append(e))
    yield events
    jax.monitoring.unregister_event_listener(listen)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def trained(**overrides):
    jax.clear_caches()  # as another process
    experiment = build(tiny_config(train_examples=16, **overrides))
    given = experiment.state, batch(experiment)
    state, metrics = experiment.train_step(*given)
    scores = experiment.task.evaluate(state, experiment.task.test)
    return float(metrics["loss"]), scores["moving_loss"]


def test_seed_and_rate_and_schedule(seen):
    first = trained(norm="kalman_mc")
    assert seen.count(MISSES) > 3
    seen.clear()
    others = [
        trained(norm="kalman_mc", seed=1),
        trained(norm="kalman_mc", learning_rate=0.3),
    ]
    assert seen.count(MISSES) <= 2  # the rates themselves, once for each rate
    assert seen.count(HITS) > 6
    losses = np.array([first, *others])
    assert losses[0, 0] == losses[2, 0] != losses[1, 0]  # before the update
    assert len(set(losses[:, 1])) == 3
    seen.clear()
    trained(norm="kalman_mc", weight_decay=0.1)
    assert seen.count(MISSES) >= 1
