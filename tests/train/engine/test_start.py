"""The passes before the first update, which `calibrate_batches` asks for."""

import logging

import chex
import jax
import numpy as np
import pytest

from tests.train.common import build, tiny_config
from tests.train.engine.toy import Pixels
from train.engine import loop
from train.engine import workdir as wd
from train.engine.start import started

TOY = dict(plugins=("tests.train.engine.toy",), task="mean_pixel")


@pytest.mark.parametrize("devices, accumulate", [(1, 1), (4, 1), (2, 2)])
def test_passes_over_the_batches_of_the_first_updates(devices, accumulate):
    """On any number of devices they set the statistics, and those alone."""
    config = tiny_config(**TOY, accumulate=accumulate, calibrate_batches=2)
    experiment = build(config, devices=jax.devices()[:devices])
    state = jax.device_get(started(config, experiment, experiment.state))

    mean, var = np.zeros(6), np.ones(6)
    for step in range(2):
        draws = experiment.task.draw(
            jax.random.split(jax.random.fold_in(experiment.key, step))[0]
        )
        pixels = Pixels(0, 64).read(step * 8 + np.arange(8))["pixels"]
        pixels = pixels + 0.01 * np.asarray(draws["noise"])
        mean = 0.9 * mean + 0.1 * pixels.mean(0)
        var = 0.9 * var + 0.1 * pixels.var(0)
    stats = state.batch_stats["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-4)
    rest = experiment.state.replace(batch_stats=state.batch_stats)
    chex.assert_trees_all_equal(state, jax.device_get(rest))


def test_only_before_the_first_update(tmp_path, monkeypatch):
    config = tiny_config(**TOY, calibrate_batches=2)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    loop.train(config, straight)
    update = loop.Loop._update

    def interrupted(self, step, *rest):
        if step == 9:  # behind a checkpoint
            raise KeyboardInterrupt
        return update(self, step, *rest)

    monkeypatch.setattr(loop.Loop, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, broken)
    monkeypatch.undo()
    loop.train(config, broken)
    fresh = build(config).state
    chex.assert_trees_all_equal(
        *(wd.last_checkpoint(workdir, fresh) for workdir in (straight, broken))
    )


def test_calibration_without_a_start_is_said(caplog):
    config = tiny_config(norm_options={"calibrate": "var"})
    experiment = build(config)
    with caplog.at_level(logging.WARNING):
        started(config, experiment, experiment.state)
    assert "set calibrate_batches" in caplog.text
