"""The commands as a user types them, and what they say to bad input."""

import csv
import importlib
import json
import pathlib
import re
import shlex
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from absl import flags
from sklearn.datasets import load_digits

from configs.studies import micro_batch_sizes
from tests.train.command import run
from tests.train.common import tiny_config
from train import cli
from train.compare import at_sizes, check_overrides, chosen, parse_norm
from train.engine import workdir
from train.engine.settings import check
from train.studies import report
from train.studies.runs import Entry, configure

STUDIES = (
    "ablation",
    "micro_batch_sizes",
    "single_device",
    "learning_rates",
    "robustness",
    "segmentation",
)
DIGITS = (
    "--config=configs/experiments/digits.py",
    "--config.train_examples=64",
    "--config.width=4",
    "--config.batch_size=8",
    "--config.epochs=2",
)
TINY = (*DIGITS, "--config.plugins=tests.train.tiny", "--config.task=tiny")


def test_a_command_is_recorded_with_the_flags_of_xla(monkeypatch):
    jax.devices()  # XLA reads its flags once, and stops at those that it does not know
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_b=2")
    command = shlex.split(workdir.provenance()["command"])
    assert command[:3] == ["XLA_FLAGS=--xla_a=1 --xla_b=2", "python", "-m"]


def test_train_then_evaluate(tmp_path):
    out = run("train", *DIGITS, f"--workdir={tmp_path}/run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    accuracies = [
        f"{summary[f'test_{option}_{key}']:.2%}"
        for option in ("moving", "batch")
        for key in ("accuracy", "top5_accuracy")
    ]
    assert "batch 8, micro-batch 2, 1 device(s), 16 steps" in out
    assert "img/s" in out and "loss=" in out  # the progress bar
    for accuracy in accuracies:
        assert accuracy in out
    out = run("train.evaluate", f"--workdir={tmp_path}/run")
    assert "step 16, 297 test images" in out
    for accuracy in accuracies:
        assert accuracy in out
    with (tmp_path / "run/confusion_test.csv").open() as file:
        (corner, *names), *rows = csv.reader(file)
    assert corner == "true \\ predicted" and names == list("0123456789")
    assert [row[0] for row in rows] == names
    counts = np.array([row[1:] for row in rows], int)
    labels = load_digits().target[1500:]
    np.testing.assert_array_equal(counts.sum(1), np.bincount(labels))
    assert f"{counts.trace() / 297:.2%}" == accuracies[0]
    picture = tmp_path / "run/confusion_test.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = run("train.evaluate", f"--workdir={tmp_path}/run", "--split=val", status=1)
    assert out == "error: split is 'val'; expected one of ['train', 'test'].\n"


def test_compare_resumes_and_reports(tmp_path):
    arguments = (
        *TINY,
        "--norms=kalman,batch@8",
        "--micro_batch_sizes=2",
        "--seeds=2",
        f"--workdir={tmp_path}",
    )
    out = run("train.compare", *arguments)
    with (tmp_path / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [(r["norm"], r["micro_batch_size"], r["seed"]) for r in rows]
    entries = [("kalman", "2"), ("batch", "8")]
    assert names == [(*entry, seed) for seed in "01" for entry in entries]
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert "python -m train.compare --config=configs/" in content["command"]
    assert [str(r["seed"]) for r in content["runs"]] == [r["seed"] for r in rows]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 4
    a, b = (float(r["test_moving_accuracy"]) for r in rows if r["norm"] == "batch")
    assert re.search(rf"\| batch +\| 8 +\| 8 .* {50 * (a + b):.2f} ± \d", table[3])

    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/summary.json")}
    assert len(before) == 4
    assert table == [
        line
        for line in run("train.compare", *arguments).splitlines()
        if line.startswith("|")
    ]
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_what_a_gpu_needs_of_the_host(tmp_path):
    out = run("benchmarks.data", "--images=32", f"--workdir={tmp_path}")
    found = json.loads((tmp_path / "data.json").read_text())
    assert f"{found['images_per_cpu_second']:.0f} images per second of CPU time" in out
    needed = found["cores_needed"]["3000"]
    assert needed * found["images_per_cpu_second"] == pytest.approx(3000)
    assert f"{needed:.1f} cores for a ResNet-50 at 3000 images/s" in out
    assert "Traceback" not in out  # of the processes that were stopped


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("train", [*TINY, "--config.wdith=4", "--workdir=w"], 'Did you mean "width"'),
        (
            "train",
            [*TINY, "--config.foo=4", "--workdir=w"],
            "a config has no key 'foo'.\n",
        ),
        (
            "train",
            ["--config=configs/studies/micro_batch_sizes.py:long", "--workdir=w"],
            "protocol is 'long'; expected one of ['tiny', 'short'].\nPass --help",
        ),
        ("train", [*TINY, "--worldir=w"], "Unknown command line flag 'worldir'"),
        ("train", TINY, "workdir must have a value"),
        ("train", [*TINY, "--workdir="], "error: --workdir is empty; expected a dir"),
        ("train", [*TINY, "--workdir=w", "--compilation_cache="], "cache is empty"),
        (
            "train",
            [*TINY, "--workdir=w", "--config.norm_options.gian=1"],
            "KalmanNorm ('kalman') has no attribute ['gian']",
        ),
        ("train", ["--config=configs/none.py", "--workdir=w"], "configs/none.py"),
        ("train.evaluate", ["--workdir=nowhere"], "error: no config.json in nowhere"),
        (
            "train",
            [
                "--config=configs/experiments/cifar10_short.py",
                "--workdir=w",
                "--data_dir=nowhere",
            ],
            "error: no cifar10 in nowhere/cifar10",
        ),
        (
            "train.compare",
            [*TINY, "--norms=bacth", "--workdir=w"],
            "error: unknown normaliser 'bacth'; known are batch",
        ),
        (
            "train.compare",
            [*TINY, "--norms=batch,kalman@3", "--workdir=w"],
            "error: micro_batch_size 3 does not divide batch_size 8",
        ),
    ],
)
def test_bad_input(module, arguments, message):
    out = run(module, *arguments, status=1)
    assert message in out
    assert "Traceback" not in out
    assert not pathlib.Path("w").exists()


@pytest.mark.parametrize("module", ["train", "train.evaluate", "train.compare"])
def test_help(module):
    """One by an interpreter of its own, as a user starts it."""
    if module == "train":
        command = [sys.executable, "-m", module, "--help"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    else:
        out = run(module, "--help")
    assert "--workdir" in out and "--data_dir" in out
    assert f"python -m {module} " in out


@pytest.mark.parametrize(
    "text, value",
    [("0.25", 0.25), ("800", 800), ("None", None), ("paper", "paper"), ("True", True)],
)
def test_options_that_are_not_there_before(text, value):
    """By the command line's own parser: `ConfigDict` would refuse the key."""
    values = flags.FlagValues()
    arguments = [
        "train",
        "--config=configs/experiments/digits.py",
        f"--config.norm_options.an_option={text}",
        "--config.optimizer_options.b1=0.8",
        "--config.plugins=train.studies.controls",
    ]
    config = cli.define_config(flag_values=values, sys_argv=arguments)
    values(arguments)
    assert config.value.norm_options.to_dict() == {"an_option": value}
    assert type(config.value.norm_options.an_option) is type(value)
    assert config.value.optimizer_options.b1 == 0.8
    assert config.value.plugins == ("train.studies.controls",)


def test_a_directory_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    values = flags.FlagValues()
    flag = flags.DEFINE_string("workdir", None, "", flag_values=values)
    values(["train", "--workdir=~/runs"])
    assert cli.path(flag) == pathlib.Path("/home/somebody/runs")


def test_where_programs_are_kept(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    set_to = {}
    monkeypatch.setattr(jax.config, "update", set_to.__setitem__)
    monkeypatch.setattr(cli, "_COMPILED", types.SimpleNamespace(value="~/programs"))
    cli.keep_compiled()
    assert set_to["jax_compilation_cache_dir"] == "/home/somebody/programs"
    monkeypatch.setattr(cli, "_COMPILED", types.SimpleNamespace(value="off"))
    cli.keep_compiled()
    assert set_to["jax_enable_compilation_cache"] is False


def test_norms_at_micro_batch_sizes():
    def entry(norm, size):
        return Entry(norm, {"norm": norm, "micro_batch_size": size})

    norms = [parse_norm("batch"), parse_norm("kalman@128")]
    expected = [entry("batch", 2), entry("batch", 4), entry("kalman", 128)]
    assert at_sizes(norms, ["2", "4", "2"]) == expected
    for norm, size in (("batch@x", "2"), ("batch", "0")):
        with pytest.raises(ValueError, match="expected a positive number"):
            at_sizes([parse_norm(norm)], [size])


@pytest.mark.parametrize("study", STUDIES)
def test_studies_can_be_run(study):
    """Every variant is a config that `check` accepts, and no two are the same run."""
    config = importlib.import_module(f"configs.studies.{study}").get_config()
    runs = set()
    for entry in at_sizes([Entry(*v) for v in config.variants], ["2"]):
        run = configure(config, entry, seed=0)
        check(run)
        runs.add(run.to_json())
    assert len(runs) == len(config.variants) > 3
    assert not any("," in name for name, _ in config.variants)  # for --variants


def test_a_study_by_another_protocol():
    """Ramps are cut to its 800 updates."""
    config = micro_batch_sizes.get_config("short")
    assert config.blocks_per_stage == 3
    options = dict(config.variants)["batch_renorm"]["norm_options"]
    assert options == {"warmup_steps": 25, "r_steps": 200, "d_steps": 125}
    with pytest.raises(ValueError, match="'long'; expected one of"):
        micro_batch_sizes.get_config("long")


def test_a_part_of_a_study():
    """A variant may come several times, with other sizes."""
    study = [Entry(name, {"seed": i}) for i, name in enumerate(("a", "b", "c", "a"))]
    assert chosen(study, None) == study
    assert chosen(study, ["c", "a"]) == [study[0], study[2], study[3]]
    with pytest.raises(ValueError, match=r"unknown variants \['d'\].*'a', 'b', 'c'"):
        chosen(study, ["a", "d"])


def test_a_flag_that_would_change_nothing():
    """One that a row of the table heeds is welcome."""
    rows = [parse_norm("batch@128"), parse_norm("kalman")]
    check_overrides(rows, ["epochs", "micro_batch_size"])
    study = [Entry("a", {"norm_options": {"gain": 0.5}})]
    for key, names in (
        ("norm", rows),
        ("micro_batch_size", rows[:1]),
        ("norm_options.rule", study),
    ):
        with pytest.raises(ValueError, match=f"a flag sets {key}, which would change"):
            check_overrides(names, [key])


def test_a_study_names_its_unknown_keys():
    config = tiny_config()
    with pytest.raises(ValueError, match="'wide' sets 'wdith', which is no key"):
        configure(config, Entry("wide", {"wdith": 8}), seed=0)


def test_compare_runs_the_variants_of_a_study(tmp_path):
    study = tmp_path / "study.py"
    study.write_text(
        "from tests.train.common import tiny_config\n"
        "def get_config():\n"
        "    return tiny_config(variants=(\n"
        "        ('gain 0.5', {'norm_options': {'gain': 0.5}}),\n"
        "        ('sorted', {'sort_batches': True, 'micro_batch_size': 4})))\n"
    )
    out = run("train.compare", f"--config={study}", f"--workdir={tmp_path}/runs")
    rows = [line.split("|")[1:4] for line in out.splitlines() if line[:1] == "|"][2:]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells == [["gain 0.5", "8", "2"], ["sorted", "8", "4"]]
    config = json.loads((tmp_path / "runs/sorted-m4-seed0/config.json").read_text())
    assert config["sort_batches"] and config["variants"] == []


def test_table_means_deviations_and_divergence():
    def made(norm, seed, accuracy):
        summary = {
            "variant": norm,
            "micro_batch_size": 2,
            "batch_size": 8,
            "devices": 1,
            "seed": seed,
            "test_moving_accuracy": accuracy,
            "test_batch_accuracy": 0.5,
            "final_train_loss": 1.0,
            "seconds": 3.0,
        }
        return report.Run(summary, [])

    lost = {"variant": "group", "micro_batch_size": 2, "seed": 0, "diverged": True}
    table = report.table(
        [made("batch", 0, 0.90), made("batch", 1, 0.92), report.Run(lost, [])]
    )
    batch, group = table.splitlines()[2:]
    assert "91.00 ± 1.41" in batch and "50.00 ± 0.00" in batch
    assert "1, 1 diverged" in group and "nan" not in group
