"""Keys that cannot be, and files of a run that are lost, damaged or not writable."""

import json
import math
import os
import pathlib
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event

from configs import base
from tests.train.common import tiny_config
from train.engine import feed, files, loop, metrics
from train.engine import workdir as wd
from train.engine.events import Events
from train.engine.experiment import build
from train.engine.optimizer import OPTIMIZERS
from train.studies import report


def test_the_page_of_keys_is_that_of_the_table():
    written = pathlib.Path("docs/config.md").read_text()
    assert written == base.page() + "\n", "run python -m configs.base > docs/config.md"
    assert base.KEYS["optimizer"].choices == tuple(OPTIMIZERS)
    base.check(base.get_config())


def with_key(key, value):
    config = tiny_config().to_dict()
    return ConfigDict(config | {key: value})


@pytest.mark.parametrize(
    "key, value",
    [
        ("stats_momentum", 2),
        ("stats_momentum", -0.1),
        ("sgd_momentum", 2),
        ("sgd_momentum", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", 10**400),
        ("weight_decay", math.nan),
        ("seed", 2**63),
        ("seed", 1.0),
        ("seed", True),
        ("width", 10**12),
        ("image_size", 10**12),
        ("crop_padding", 10**12),
        ("eval_batch_size", 10**12),
        ("blocks_per_stage", 10**12),
        ("total_steps", 10**12),
        ("flip", 1),
        ("norm", None),
        ("epochs", None),
        ("epochs", np.int64(3)),
        ("norm_options", None),
        ("norm_options", "gain=1"),
        ("norm_options", {"gain": {"a": 1}}),
        ("norm_options", {"gain": "much"}),
        ("optimizer_options", {"nesterov": "much"}),
        ("optimizer_options", 3),
        ("step_epochs", ("abc",)),
        ("step_epochs", (1.5,)),
        ("step_epochs", "abc"),
        ("step_factors", (math.inf,)),
        ("profile_steps", ("a", "b")),
        ("freeze", (3,)),
        ("freeze", "stem"),
        ("plugins", (None,)),
        ("variants", ("batch",)),
        ("variants", (("a", "b"),)),
        ("variants", (("a\nb", {}),)),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(key, value, tmp_path):
    with pytest.raises(
        ValueError, match=key if key != "norm_options" else "norm_o|gain"
    ):
        loop.train(with_key(key, value), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_betas_of_adam():
    config = tiny_config(optimizer="adamw", optimizer_options={"b2": 1.0})
    with pytest.raises(ValueError, match=r"optimizer_options.b2 is 1.0; .*below 1"):
        build(config)


@pytest.mark.parametrize("config", [None, {}, ConfigDict({"seed": 1})])
def test_a_config_that_is_none(config, tmp_path):
    with pytest.raises(ValueError, match=r"configs.base.get_config\(\)"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_options_as_a_plain_dict():
    config = ConfigDict(convert_dict=False)
    config.update(tiny_config())
    config = ConfigDict({**config, "norm_options": {"gain": 0.5}}, convert_dict=False)
    assert type(config.norm_options) is dict
    assert build(config).task.network.norm.keywords["gain"] == 0.5


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    loop.train(tiny_config(epochs=1), folder)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A finished run, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


JUNK = (b"", b"{", b"[]", b"\xff\xfe\x00", b"null", b"\0" * 64, b"[" * 100_000)


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
@pytest.mark.parametrize("name", ["config.json", "summary.json", "data.json"])
def test_a_damaged_file_is_named(run, name, junk):
    if name == "data.json":
        (run / "summary.json").unlink()
    (run / name).write_bytes(junk)
    with pytest.raises(ValueError, match=rf"{name} is damaged.*; delete it") as error:
        loop.train(tiny_config(epochs=1), run)
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize(
    "change", [{"width": "x"}, {"seed": -3}, {"norm_options": "{"}]
)
def test_a_config_of_nonsense_is_named(run, change):
    stored = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(stored | change))
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        wd.read_config(run)


@pytest.mark.parametrize("key, value", [("steps", None), ("seconds", "1"), ("norm", 3)])
def test_a_summary_of_nonsense_is_named(run, key, value):
    stored = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(stored | {key: value}))
    with pytest.raises(ValueError, match=rf"summary\.json is damaged .*{key}"):
        loop.train(tiny_config(epochs=1), run)


@pytest.mark.parametrize("line", [b"junk", b"3", b"{}", b'{"step": "1", "seconds": 2}'])
def test_a_damaged_line_of_metrics_is_named(run, line):
    path = run / "metrics.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"line 1 of .*metrics\.jsonl is damaged; del"):
        metrics.read_metrics(run)


def test_lost_metrics_do_not_keep_a_run_from_its_end(run, caplog):
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").unlink()
    summary = loop.train(tiny_config(epochs=1), run)
    assert "metrics.jsonl has no training loss, so it was lost" in caplog.text
    assert summary["final_train_loss"] is None and summary["test_moving_accuracy"] > 0
    assert "test accuracy on 297" in report.describe(summary)
    made = report.Run({"variant": "a"} | summary, [])
    report.write_csv(run / "c.csv", [made])
    (again,) = report.from_frame(report.read_csv(run / "c.csv"))
    assert not again.diverged
    assert report.table([again]) == report.table([made])


def test_a_finished_run_is_only_read(run, monkeypatch):
    def refuse(*_):
        raise OSError("read-only file system")

    for name in ("replace", "fsync", "mkdir"):
        monkeypatch.setattr(os, name, refuse)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert loop.train(tiny_config(epochs=1), run)["steps"] == 8
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_json_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    real = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), real[0](fd)),
    )
    monkeypatch.setattr(os, "replace", lambda *a: (done.append("replace"), real[1](*a)))
    files.write_json(tmp_path / "a.json", {"b": 1})
    assert done == [f"{tmp_path}/a.json.tmp", "replace", str(tmp_path)]
    assert files.read_json(tmp_path / "a.json", "") == {"b": 1}


def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "a.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*a\.json"):
        files.write_json(tmp_path / "a.json", {})
    assert not list(tmp_path.iterdir())
    log = metrics.MetricsLog(tmp_path, 0)
    log._lines = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        log.write(1, 1.0, loss=2.0)


def test_events_are_there_at_once(tmp_path):
    events = Events(tmp_path, 4)
    events.write(5, {"loss": 0.5})
    (path,) = tmp_path.iterdir()
    content, found = path.read_bytes(), []
    while content:
        size = int.from_bytes(content[:8], "little")
        found.append(Event.FromString(content[12 : 12 + size]))
        content = content[16 + size :]
    events.close()
    assert [event.step for event in found[-2:]] == [5, 5]
    assert found[-1].summary.value[0].tag == "loss"
    assert found[-1].summary.value[0].simple_value == 0.5


def test_a_data_worker_that_is_killed():
    def batches():
        yield 1
        raise RuntimeError(
            "Worker process was terminated unexpectedly with exit code -9"
        )

    alive = feed._alive(batches())
    assert next(alive) == 1
    with pytest.raises(ChildProcessError, match="data_workers was killed"):
        next(alive)
