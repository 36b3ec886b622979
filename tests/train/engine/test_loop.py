"""Whole runs: resuming, refusing, stopping."""

import json
import os
import resource
import shutil
import signal

import chex
import jax
import numpy as np
import pytest

from tests.train.common import REAL, build, tiny_config
from train.engine import loop, metrics, processes
from train.engine import workdir as wd
from train.studies.report import describe

pytestmark = pytest.mark.usefixtures("built_once")


def last_state(workdir, config):
    with wd.open_checkpoints(workdir) as checkpoints:
        return wd.restore(checkpoints, build(config).state)


def interrupt_at(monkeypatch, at):
    """Ctrl-C before update `at`."""
    update = loop.Loop._update

    def interrupted(self, step, *rest):
        if step == at:
            raise KeyboardInterrupt
        return update(self, step, *rest)

    monkeypatch.setattr(loop.Loop, "_update", interrupted)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    config = tiny_config(crop_padding=1, flip=True)
    return workdir, config, loop.train(config, workdir)


@pytest.fixture
def finished(trained, tmp_path_factory):
    """A finished run; each test has its own copy of the directory to go on in."""
    workdir, config, summary = trained
    copy = tmp_path_factory.mktemp("finished")
    return shutil.copytree(workdir, copy, dirs_exist_ok=True), config, summary


def test_resume_equals_no_interruption(finished, tmp_path, monkeypatch):
    """Bit for bit: state, test metrics, and the training metrics in between."""
    straight, config, summary = finished
    with monkeypatch.context() as patch:
        interrupt_at(patch, 13)  # between the checkpoints of steps 8 and 16
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, tmp_path)
    assert metrics.read_metrics(tmp_path)[-1]["step"] == 12
    resumed = loop.train(config, tmp_path)

    chex.assert_trees_all_equal(
        last_state(straight, config), last_state(tmp_path, config)
    )
    for key in ("test_moving_accuracy", "test_batch_loss", "final_train_loss", "steps"):
        assert resumed[key] == summary[key]
    timing = {"seconds", "images_per_second", "data_wait", "memory_bytes"}
    logs = [
        [{k: v for k, v in line.items() if k not in timing} for line in log]
        for log in map(metrics.read_metrics, (straight, tmp_path))
    ]
    assert logs[0] == logs[1]


def test_what_a_run_leaves(finished):
    workdir, config, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert wd.read_config(workdir).to_json() == config.to_json()
    assert (summary["batch_size"], summary["micro_batch_size"]) == (8, 2)
    assert (summary["steps"], summary["test_images"]) == (16, 297)
    assert summary["predicted"] == [3, 3]
    assert describe(summary).endswith("\n3 of 3 normalisers predicted")
    assert set(summary["versions"]) >= {"jax", "flax", "python"}
    assert list((workdir / "tensorboard").glob("events*"))
    last = metrics.read_metrics(workdir)[-1]
    assert last["test_moving_accuracy"] == summary["test_moving_accuracy"]


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    workdir, config, summary = finished
    monkeypatch.setattr(loop, "build", None)
    assert loop.train(config, workdir) == summary


def test_killed_between_last_checkpoint_and_summary(finished):
    workdir, config, summary = finished
    (workdir / "summary.json").unlink()
    again = loop.train(config, workdir)
    assert logged_tests(workdir) == [8, 16]
    assert again["test_moving_accuracy"] == summary["test_moving_accuracy"]
    assert again["final_train_loss"] == summary["final_train_loss"]


def logged_tests(workdir):
    return [x["step"] for x in metrics.read_metrics(workdir) if "test_batch_loss" in x]


@pytest.mark.parametrize(
    "how, at",
    [
        ("killed", 8),
        ("stopped", 16),
        pytest.param("killed", 16, marks=pytest.mark.slow),
        pytest.param("stopped", 8, marks=pytest.mark.slow),
    ],
)
def test_every_test_is_made_once(finished, tmp_path, monkeypatch, at, how):
    """Killed in the test behind a checkpoint, or stopped ahead of it or in the last."""
    straight, config, summary = finished
    with monkeypatch.context() as patch:
        real = loop.Loop._test

        def interrupted(self, done, *rest):
            if done == at and how == "killed":
                raise KeyboardInterrupt
            if done == at:
                signal.raise_signal(signal.SIGTERM)
            real(self, done, *rest)

        patch.setattr(loop.Loop, "_test", interrupted)
        with pytest.raises((KeyboardInterrupt, processes.Stopped)):
            loop.train(config, tmp_path)
    ended = (tmp_path / "summary.json").exists()
    assert ended == (how == "stopped" and at == 16)  # all is done, but nothing follows
    again = loop.train(config, tmp_path)
    assert logged_tests(tmp_path) == logged_tests(straight) == [8, 16]
    for key in ("test_moving_accuracy", "test_batch_loss"):
        assert again[key] == summary[key]


def test_keys_of_no_matter_may_change(finished):
    workdir, config, summary = finished
    other = config.copy_and_resolve_references()
    other.update(debug_nans=True, data_workers=3, profile_steps=(1, 2))
    assert loop.train(other, workdir) == summary


def test_a_config_from_before_a_key_existed(finished):
    workdir, config, summary = finished
    stored = json.loads((workdir / "config.json").read_text())
    del stored["sort_batches"], stored["variants"]
    (workdir / "config.json").write_text(json.dumps(stored))
    assert wd.read_config(workdir).to_json() == config.to_json()
    again = loop.train(config, workdir)  # not refused
    assert again["final_train_loss"] == summary["final_train_loss"]


def test_a_config_with_options_in_json(finished):
    """As they were before they could be nested, and without plugins."""
    workdir, config, summary = finished
    config = config.copy_and_resolve_references()
    stored = json.loads((workdir / "config.json").read_text())
    stored["norm_options"] = "{}"
    del stored["plugins"], stored["task"], stored["total_steps"], stored["freeze"]
    (workdir / "config.json").write_text(json.dumps(stored))
    config.update(REAL)  # what they are without these keys
    assert loop.train(config, workdir) == summary
    stored |= {"norm_options": "{}", "norm": "kalman_paper_wc", "width": 16}
    (workdir / "config.json").write_text(json.dumps(stored | {"network": "resnet50"}))
    old = wd.read_config(workdir)
    assert (old.norm, old.width) == ("kalman_paper_literal_wc", 0)
    stored |= {"norm_options": '{"hand_on": "raw"}', "norm": "control_moving_wc"}
    (workdir / "config.json").write_text(json.dumps(stored))
    old = wd.read_config(workdir)
    assert old.norm_options.to_dict() == {"propagate": "raw"}
    assert build(old).task.network.norm.func.__name__ == "MovingKalmanNorm"


def test_workdir_of_another_config_is_refused(finished):
    workdir, config, _ = finished
    other = config.copy_and_resolve_references()
    other.norm, other.seed = "batch", 7
    with pytest.raises(ValueError, match="another config") as error:
        loop.train(other, workdir)
    assert "norm: 'kalman' there, 'batch' asked for" in str(error.value)
    assert "seed: 0 there, 7 asked for" in str(error.value)
    assert "width" not in str(error.value)


def test_bad_config_claims_no_workdir(tmp_path):
    with pytest.raises(ValueError, match="unknown normaliser"):
        loop.train(tiny_config(norm="bacth"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    """The rate explodes in the second epoch, and the weights with it."""
    config = tiny_config(schedule="step", step_epochs=(1,), step_factors=(1e38,))
    with pytest.raises(loop.NonFiniteError, match=r"at step 9: .*of step 8, is"):
        loop.train(config, tmp_path)
    state = last_state(tmp_path, config)
    assert state.step == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert not (tmp_path / "summary.json").exists()


def test_metrics_of_a_crash_are_forgotten(tmp_path):
    """A half-written line, and lines after the checkpoint."""
    log = metrics.MetricsLog(tmp_path, 0)
    log.write(5, 1.0, train_loss=2.0)
    log.write(9, 2.0, train_loss=1.0)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    log = metrics.MetricsLog(tmp_path, 8)
    assert log.seconds == 1.0
    log.close()
    assert metrics.read_metrics(tmp_path) == [
        {"step": 5, "seconds": 1.0, "train_loss": 2.0}
    ]


@pytest.fixture
def two_checkpoints(finished):
    """A finished run that has lost its summary."""
    workdir, config, summary = finished
    (workdir / "summary.json").unlink()
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert names == ["16", "8"]
    return workdir, config, summary


def damage(folder, how):
    if how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
        return
    for path in folder.rglob("d/*"):  # some are left over from writing, and never read
        content = bytearray(path.read_bytes())
        if how == "short":
            content = content[: len(content) // 2]
        else:
            content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["empty", "short", "one bit"])
def test_damaged_checkpoint_is_reported_and_the_one_before_used(
    two_checkpoints, how, caplog
):
    workdir, config, summary = two_checkpoints
    damage(workdir / "checkpoints" / "16", how)
    again = loop.train(config, workdir)
    assert "checkpoint of step 16" in caplog.text
    assert "going on from the checkpoint of step 8" in caplog.text
    for key in ("test_moving_loss", "final_train_loss", "steps"):
        assert again[key] == summary[key]


def test_no_checkpoint_that_can_be_read(two_checkpoints):
    workdir, config, _ = two_checkpoints
    for name in ("8", "16"):
        damage(workdir / "checkpoints" / name, "short")
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* can be read"):
        loop.train(config, workdir)
    assert (workdir / "checkpoints" / "16").exists()


def test_a_checkpoint_that_cannot_be_written(two_checkpoints):
    """No file may grow beyond 1 KB: to the writer as bad as a full disk."""
    workdir, config, _ = two_checkpoints
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with wd.open_checkpoints(workdir) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            with pytest.raises(OSError, match=r"of step 17 could not be saved in .*"):
                wd.save(checkpoints, 17, build(config).state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last_state(workdir, config).step == 16


def test_a_run_without_checkpoints_is_left_as_it_is(finished, tmp_path):
    workdir, config, _ = finished
    shutil.copy(workdir / "config.json", tmp_path)
    state = build(config).state
    for path in (tmp_path / "checkpoints", tmp_path / "checkpoints" / "8"):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*checkpoints:"):
            wd.last_checkpoint(tmp_path, state)
        assert not path.exists()
        path.parent.mkdir(exist_ok=True)


def test_two_runs_in_one_workdir_are_refused(tmp_path):
    refused = pytest.raises(ValueError, match=f"another run, process {os.getpid()} on")
    with wd.locked(tmp_path), refused:
        loop.train(tiny_config(), tmp_path)


def test_a_trace_for_the_profiler(tmp_path):
    config = tiny_config(train_examples=32, epochs=1, profile_steps=(1, 3))
    loop.train(config, tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match=r"profile_steps is \(3, 1\); expected"):
        loop.train(tiny_config(profile_steps=(3, 1)), tmp_path / "other")
    assert not (tmp_path / "other").exists()
