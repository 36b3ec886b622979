"""Runs find their way into the ledger, each once."""

import csv
import json
import pathlib

import pytest

from configs.experiments import cifar10_tiny
from train.studies import ledger

PROVENANCE = {
    "command": "python -m train.compare --seeds=2",
    "hardware": {"devices": ["cpu", "cpu"], "machine": "x86_64", "cores": 2},
    "versions": {"python": "3.11.7", "jax": "0.10.2"},
}


@pytest.fixture
def folder(tmp_path):
    """A ledger without a run."""
    for name in (ledger.RUNS, ledger.COMMANDS):
        header = pathlib.Path("docs/results", name).read_text().splitlines()[0]
        (tmp_path / name).write_text(header + "\n")
    return tmp_path


def rows(folder):
    with (folder / ledger.RUNS).open() as file:
        return list(csv.DictReader(file))


def run(variant, seed, accuracy, **changed):
    return {
        "variant": variant,
        "norm": "kalman",
        "batch_size": 128,
        "micro_batch_size": 2,
        "learning_rate": 0.1,
        "devices": 1,
        "seed": seed,
        "test_moving_accuracy": accuracy,
        "test_batch_accuracy": accuracy,
        "final_train_loss": None if accuracy is None else 1.4983693361282349,
        "parameters": None if accuracy is None else 75290,
        "config": changed,
    }


def comparison(path, *runs):
    config = cifar10_tiny.get_config().to_dict()
    path.mkdir(exist_ok=True)
    content = PROVENANCE | {"config": config, "runs": list(runs)}
    (path / "comparison.json").write_text(json.dumps(content))
    return path


def test_a_comparison_is_added_once(folder):
    lost = run("bfloat16", 1, None, dtype="bfloat16", eval_epochs=1)
    source = comparison(folder / "runs", run("plain", 0, 0.4519), lost)
    assert ledger.add(folder, source, "mine") == 2
    assert ledger.add(folder, source, "mine") == 0
    plain, diverged = rows(folder)
    assert (plain["study"], plain["variant"], plain["seed"]) == ("mine", "plain", "0")
    assert (plain["experiment"], plain["config"]) == ("cifar10_tiny", "")
    assert plain["final_train_loss"] == "1.4983693361282349"  # to the last digit
    assert json.loads(diverged["config"]) == {"dtype": "bfloat16"}
    assert (diverged["diverged"], diverged["test_moving_accuracy"]) == ("True", "")
    with (folder / ledger.COMMANDS).open() as file:
        (command,) = csv.DictReader(file)
    assert command["command"] == PROVENANCE["command"]
    assert command["hardware"] == "2 x cpu, x86_64, 2 cores"
    assert {plain["command_hash"]} == {command["command_hash"]}

    more = comparison(folder / "runs", run("plain", 0, 0.4519), run("plain", 1, 0.45))
    assert ledger.add(folder, more, "mine") == 1
    assert ledger.add(folder, more, "another") == 2
    before = (folder / ledger.RUNS).read_text()
    other = comparison(folder / "runs", run("plain", 0, 0.4520))
    with pytest.raises(ValueError, match=r"other results of .*'variant': 'plain'"):
        ledger.add(folder, other, "mine")
    assert (folder / ledger.RUNS).read_text() == before


def test_a_single_run_is_added_with_the_metrics_of_its_task(folder):
    workdir = folder / "run"
    workdir.mkdir()
    config = cifar10_tiny.get_config().to_dict() | {"clip_norm": 1.0, "seed": 3}
    (workdir / "config.json").write_text(json.dumps(config))
    found = run("", 3, 0.5) | {"headline": "test_moving_miou", "test_moving_miou": 0.25}
    found |= {"test_moving_box_AP50": 0.75, "test_moving_box_AP_small": 0.5}
    del found["config"], found["variant"]
    (workdir / "summary.json").write_text(json.dumps(PROVENANCE | found))
    assert ledger.add(folder, workdir, "mine") == 1
    (row,) = rows(folder)
    assert row["variant"] == "kalman" and row["test_moving_miou"] == "0.25"
    assert row["config"] == '{"clip_norm":1.0}' and row["seed"] == "3"
    assert row["test_moving_box_AP50"] == "0.75"
    assert "test_moving_box_AP_small" not in row  # of COCO's numbers AP and AP50


def test_other_directories_are_refused(folder):
    (comparison(folder / "half") / "comparison.json").write_text('{"runs": [')
    with pytest.raises(ValueError, match=r"half/comparison\.json is damaged; run its"):
        ledger.add(folder, folder / "half", "mine")
    with pytest.raises(ValueError, match="neither a comparison"):
        ledger.add(folder, folder, "mine")
