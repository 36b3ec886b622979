"""A task of one's own stands beside classification, and the engine need not know."""

import re

import jax
import numpy as np
import pytest

from tests.train.command import run
from tests.train.common import REAL, build, tiny_config
from train.engine import loop, metrics, plugins
from train.engine import workdir as wd
from train.engine.classification import Classification
from train.engine.task import of_kind

TOY = dict(plugins=("tests.train.engine.toy",), task="mean_pixel", crop_padding=3)


def test_a_second_task_trains_tests_and_resumes(tmp_path):
    config = tiny_config(**TOY, epochs=20, weight_decay=0.0)
    summary = loop.train(config, tmp_path)
    assert summary["headline"] == "test_error"
    assert summary["steps"] == 160 and summary["train_images"] == 64
    tests = [line for line in metrics.read_metrics(tmp_path) if "test_error" in line]
    assert summary["test_error"] == tests[-1]["test_error"] < 0.1
    assert tests[0]["test_error"] > 2 * summary["test_error"]
    params = wd.last_checkpoint(tmp_path, build(config).state).params
    assert (np.array(params["Dense_0"]["kernel"]) > 0).all()  # all pixels count
    out = run("train.evaluate", f"--workdir={tmp_path}", "--split=held_out",
              "--precise_batches=2")  # fmt: skip
    assert re.search(
        r"step 160, 5 held_out images\nmoving statistics:\n  +([\d.]+)  error\n"
        r"precise statistics of 2 training batches:\n  +[\d.]+  error\n$",
        out,
    )[1] == format(summary["test_error"], ".4f")


def test_commands_for_images_say_so():
    config = tiny_config(**TOY)
    with pytest.raises(ValueError, match="classification, not of MeanPixel"):
        of_kind(build(config).task, Classification)


def test_devices_and_parts_change_nothing():
    def trained(devices, accumulate):
        config = tiny_config(**TOY, accumulate=accumulate)
        experiment = build(config, devices=jax.devices()[:devices])
        state = experiment.state
        for step in range(3):
            state, metrics = experiment.train_step(state, experiment.batch(step))
        return jax.device_get((state.params, state.batch_stats, metrics))

    expected = trained(1, 1)
    for devices, accumulate in ((4, 1), (2, 2)):
        found = trained(devices, accumulate)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
            found,
            expected,
        )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            REAL | dict(task="mean_pixel"),
            r"'mean_pixel'; expected one of \['classification",
        ),
        (TOY | dict(width=8), "width is for images"),
        (
            REAL | dict(plugins=("nowhere",)),
            "plugins names 'nowhere', which cannot be imp",
        ),
        (TOY | dict(plugins=TOY["plugins"] * 2), "has .'mean_pixel'., which there are"),
        (dict(norm="control_moving"), "unknown normaliser 'control_moving'; known are"),
    ],
)
def test_what_is_not_there(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        build(tiny_config(**overrides))
    assert "control_shuffled" not in str(error.value)


def test_a_study_brings_its_normalisers():
    controls = {"plugins": ("train.studies.controls",), "norm": "control_shuffled"}
    config = tiny_config(**REAL | controls)
    network = build(config).task.network
    assert network.norm.func.__name__ == "ShuffledKalmanNorm"
    assert plugins.known(tiny_config(), "NORMALIZERS", {"batch": 1}) == {"batch": 1}
