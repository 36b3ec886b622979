"""Runs that are killed, stopped, and spread over processes: real ones, by command."""

import functools
import random
import signal
import socket
import time

import chex
import jax
import pytest

from configs.experiments import digits
from tests.reference.slow import few_quick
from tests.train.command import Command
from tests.train.common import TINY
from train.engine import metrics
from train.engine import workdir as wd
from train.engine.experiment import build

#: keys of the config: 24 updates, a checkpoint every second one
KEYS = dict(
    train_examples=32,
    batch_size=16,
    width=4,
    epochs=12,
    log_steps=1,
    eval_epochs=12,
    eval_batch_size=297,
)


def start(workdir, *flags, devices=1):
    """Starts the command on a workdir, with so many devices, and flags."""
    keys = [f"--config.{key}={value}" for key, value in KEYS.items()]
    keys.append(f"--config.plugins={','.join(TINY['plugins'])}")
    keys.append(f"--config.task={TINY['task']}")
    config = "--config=configs/experiments/digits.py"
    return Command(
        "train", config, f"--workdir={workdir}", *keys, *flags, devices=devices
    )


def wait_for_progress(command, workdir, step=1):
    """Waits until the log of the run has come to `step`."""
    while command.process.is_alive():
        if any(line["step"] >= step for line in metrics.read_metrics(workdir)):
            return
        time.sleep(0.01)
    raise AssertionError(command.printed())


def config():
    config = digits.get_config()
    config.update(KEYS, **TINY)
    return config


@functools.cache
def structure():
    return build(config(), devices=jax.devices()[:1]).state


def final_state(workdir):
    with wd.open_checkpoints(workdir) as checkpoints:
        assert checkpoints.latest_step() == 24
        return jax.device_get(wd.restore(checkpoints, structure()))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What an uninterrupted run on one device leaves."""
    workdir = tmp_path_factory.mktemp("straight")
    start(workdir).finish()
    return final_state(workdir)


@pytest.mark.parametrize("kills", few_quick([2, 5], [2]))
def test_killed_at_random_moments(straight, tmp_path, kills):
    """In updates and in checkpoints, which take most of this run's time: to the bit."""
    moments = random.Random(0)
    for kill in range(kills):
        command = start(tmp_path)
        wait_for_progress(command, tmp_path, step=1 + 20 // kills * kill)
        time.sleep(moments.uniform(0.0, 0.3))
        command.process.kill()
        command.finish(status=-signal.SIGKILL)
    assert not (tmp_path / "summary.json").exists()
    start(tmp_path).finish()
    chex.assert_trees_all_equal(final_state(tmp_path), straight)
    steps = [
        line["step"] for line in metrics.read_metrics(tmp_path) if "train_loss" in line
    ]
    assert steps == list(range(1, 25))


def two(workdirs, flags=((), ())):
    """Starts two processes that train together, of two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        start(
            workdirs[i],
            f"--coordinator=localhost:{port}",
            "--num_processes=2",
            f"--process_id={i}",
            *flags[i],
            devices=2,
        )
        for i in range(2)
    ]


@pytest.mark.parametrize(
    "workdirs, flags, message",
    [
        ("cc", [(), ("--config.learning_rate=0.4",)], "differ in their config: ["),
        ("ab", [(), ()], "which must be on a disk that they share: [1, 0]"),
    ],
)
def test_processes_that_do_not_agree(tmp_path, workdirs, flags, message):
    (tmp_path / "a").mkdir()
    wd.claim(tmp_path / "a", config())  # by a run of before, which was killed
    for command in two([tmp_path / name for name in workdirs], flags):
        out = command.finish(status=1)
        assert message in out and "Traceback" not in out


def test_stopped_and_resumed_on_two_processes(straight, tmp_path):
    """SIGTERM on four devices; then twice two, where the first alone prints."""
    command = start(tmp_path, devices=4)
    wait_for_progress(command, tmp_path)
    command.process.terminate()
    out = command.finish(status=128 + signal.SIGTERM)
    assert "stopped as asked, after step" in out and "Traceback" not in out

    first, second = (command.finish() for command in two([tmp_path] * 2))
    assert "4 device(s)" in first and "test accuracy" in first
    assert "device(s)" not in second and "accuracy" not in second
    resumed = final_state(tmp_path)
    assert resumed.step == straight.step
    chex.assert_trees_all_close(resumed.params, straight.params, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "coordinator, message",
    [
        ("localhost:1", "--num_processes and --process_id go together"),
        ("auto", "JAX detects no cluster here"),
    ],
)
def test_processes_that_do_not_find_each_other(tmp_path, coordinator, message):
    out = start(tmp_path, f"--coordinator={coordinator}").finish(status=1)
    assert message in out and "Traceback" not in out
