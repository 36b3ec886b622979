"""The paper's tables and figures beside ours."""

import csv
import json
import math

import numpy as np
import pytest

from tests.train.command import run
from tests.train.common import tiny_config
from train.data.sets import examples, load_dataset
from train.engine.classification import make_network
from train.engine.settings import check
from train.paper import (
    REPRODUCTIONS,
    cifar,
    figure5,
    printed,
    reproduce_all,
    table2,
    table3,
)
from train.paper.measure import OPTION_A, OPTION_B, steps_to
from train.paper.picture import Curve
from train.paper.result import Result, table
from train.paper.scale import SCALES, reduced, scaled, updates
from train.paper.trained import OURS, Column, Request, Trained, name_of
from train.studies import report

TRAINED = {name: t for name, t in REPRODUCTIONS.items() if isinstance(t, Trained)}
CLASSES = {"imagenet2012": 1000, "cifar100": 100, "cifar10": 10, "svhn_cropped": 10}


def test_table_2_of_one_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table2, "NETWORK_NAMES", {"inception_v2": "Inceptionv2"})
    monkeypatch.setattr(table2, "NORMALIZER_ROWS", table2.NORMALIZER_ROWS[::2])
    table2.reproduce("table2", Request(workdir=tmp_path))
    with (tmp_path / "table2.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["paper"] for row in rows] == ["11.29", "11.30"]
    out = capsys.readouterr().out
    for row in rows:
        assert row["paper"] == row["ours"]
        assert f"{int(row['parameters']):,}" in out
    assert "2 of 2 cells agree" in out and table2.NOTE in out


@pytest.mark.slow
def test_table_2_is_the_papers_to_its_printed_digits(tmp_path):
    out = run("train.reproduce", "table2", f"--workdir={tmp_path}/made")
    with (tmp_path / "made/table2.csv").open() as file:
        rows = list(csv.DictReader(file))
    printed = {(row["normalizer"], row["network"]): row["paper"] for row in rows}
    assert len(rows) == len(printed) == 12
    assert printed["KN, learned q and R", "resnet101"] == "44.60"
    assert printed["BN", "inception_v2"] == "11.29"
    for row in rows:
        assert row["paper"] in (row["ours"], "")
        assert f"{int(row['parameters']):,}" in out
    assert "9 of 9 cells agree" in out and table2.NOTE in out


def test_verdict_counts_what_differs():
    row = table2.Row("BN", "resnet50", 25_557_032, "25.56", "25.56")
    other = row._replace(paper="25.57")
    assert table2.verdict([row, other, row._replace(paper="")]).startswith("1 of 2")


def test_the_papers_tables_agree_with_its_text():
    """Its sections 4.1 and 4.3 repeat many digits as differences."""

    def gap(grid, column, row, other):
        return round(float(grid[row, column]) - float(grid[other, column]), 2)

    for column, gain in (("Inceptionv2", 0.9), ("ResNet101", 0.9), ("ResNet50", 0.4)):
        assert gap(printed.TABLE1, column, "KN", "BN") == gain
    assert gap(printed.TABLE1, "ResNet50", "GN", "BN") == -0.5
    fewer = 1 - 100 / 170
    assert [printed.TABLE1[row, "Iters@73.1%"] for row in ("BN", "KN")] == [
        "170k",
        "100k",
    ] and round(100 * fewer, 1) == 41.2
    speeds = [
        float(printed.TABLE3[row, "examples/s"]) for row in ("BN", "KN", "BN / KN")
    ]
    assert round(speeds[0] / speeds[1], 3) == speeds[2] == 1.015
    assert gap(printed.TABLE4, "Option A", "KN", "BN") == 3.4
    assert gap(printed.TABLE4, "Option B", "KN", "GN") == 0.3
    assert gap(printed.TABLE5, "Acc @120k iters", "KN", "BN") == 2.11
    assert gap(printed.TABLE5, "Acc @120k iters", "KN", "BRN") == 2.75
    for other, gain in (("BN", 3.5), ("BRN", 1.58), ("WN", 5.3), ("LN", 20.28)):
        column, rows = "Inception CIFAR100", ("KN (bs = 2)", f"{other} (bs = 2)")
        assert gap(printed.TABLE8, column, *rows) == gain
    assert gap(printed.TABLE8, "ResNet32", "KN (bs = 2)", "GN (bs = 2)") == 1.4
    bkn = gap(printed.TABLE8, "ResNet32", "KN (bs = 2)", "BN (bs = 2)")
    assert bkn == float(printed.FIGURE4["BKN - BN", "accuracy"]) == 1.5
    for row in ("BN (bs = 2)", "BN (bs = 128)", "KN (bs = 2)"):
        moving = printed.TABLE7[row, "using moving mean/var"]
        assert moving == printed.TABLE8[row, "Inception CIFAR10"]


@pytest.mark.parametrize("scale", SCALES)
def test_every_run_is_a_valid_config(scale):
    """And two that share a directory are the same run, in whichever tables."""
    by_name = {}
    for reproduction in TRAINED.values():
        for full in reproduction.cells().values():
            config = scaled(full, scale, data_dir="nowhere")
            check(config)
            make_network(config, CLASSES[full.dataset])
            assert updates(config) > 0 and bool(reduced(full, config)) == (
                scale != "full"
            )
            assert by_name.setdefault(name_of(config), config) == config
            if scale == "smoke":
                deep = full.dataset == "imagenet2012"
                assert config.dataset == ("digits32" if deep else "digits")
                assert config.network == (full.network if deep else "cifar_resnet")
            else:
                assert config.dataset == full.dataset


@pytest.mark.parametrize("name", TRAINED)
def test_every_number_of_the_paper_stands_beside_a_run(name):
    reproduction = TRAINED[name]
    cells = {cell for cell in reproduction.printed if " - " not in cell[0]}
    assert cells <= {(row, name.split(",")[0]) for row, name in reproduction.cells()}


def test_batch_sizes_are_those_of_the_rows():
    for (row, _), config in (cifar.TABLE7.cells() | cifar.TABLE8.cells()).items():
        assert f"(bs = {config.micro_batch_size})" in row and config.batch_size == 128


@pytest.mark.parametrize("name", ["table4", "table5"])
def test_both_readings_of_8_gpus(name):
    """Beside the same number of the paper, at one rate for each image."""
    cells = TRAINED[name].cells()
    images = {config.batch_size for config in cells.values()}
    (micro_batch,) = {config.micro_batch_size for config in cells.values()}
    assert images == {256, 8 * micro_batch}
    for (row, column), config in cells.items():
        paper = TRAINED[name].printed.get(
            (row.removesuffix(OURS), column.split(",")[0])
        )
        assert TRAINED[name]._paper(row, column) == (paper or "")
        assert config.learning_rate / config.batch_size == pytest.approx(0.1 / 256)
    if name == "table5":
        steps = {updates(config) for config in cells.values()}
        assert steps == {120_000, 120_096}


def test_the_rate_falls_before_the_paper_has_its_accuracy():
    """Table 1 prints 100k updates to 73.1 %, and 170k to where batch norm ends."""
    config = TRAINED["table1"].cells()["KN", "Iters@73.1%"]
    per_epoch = updates(config) // config.epochs
    assert abs(updates(config) - 170_000) < per_epoch
    assert config.step_epochs[1] * per_epoch < 100_000 < updates(config)


def test_what_was_reduced():
    cells = cifar.TABLE8.cells()
    full = cells["BRN (bs = 2)", "Inception SVHN"]
    assert reduced(full, full) == ""
    assert abs(updates(full) - 156_000) < updates(full) // full.epochs
    assert reduced(full, scaled(full, "smoke", "nowhere")) == (
        "128 + 128 images of digits in place of 604,388 + 26,032 images of"
        " svhn_cropped, 2 of 33 epochs, crop_padding 0 in place of 4, network ResNet-8"
        " of width 32 in place of small_inception, norm_options"
        " {'d_steps': 0, 'r_steps': 0, 'warmup_steps': 0} in place of {}, schedule"
        " cosine in place of step"
    )
    full = cells["KN (bs = 2)", "ResNet32"]
    assert reduced(full, scaled(full, "short", None)) == (
        "25,600 of 50,000 training images, 4 of 400 epochs, network ResNet-20 of width"
        " 16 in place of resnet32, schedule cosine in place of step"
    )


def test_sizes_of_data_sets():
    found = load_dataset("digits")
    assert examples("digits") == (found.train.examples, found.test.examples)


def made(accuracies, **summary):
    lines = [
        {"step": 10 * i, "test_moving_accuracy": accuracy}
        for i, accuracy in enumerate(accuracies, start=1)
    ]
    return report.Run(summary, [{"step": 5, "train_loss": 1.0}, *lines])


def test_steps_to_an_accuracy():
    runs = [
        made([0.70, 0.731, 0.72, 0.74]),
        made([0.7309]),
        made([0.9], diverged=True),
    ]
    steps = steps_to(0.731)
    first, *others = steps.values(runs)
    assert first == 20 and all(map(math.isnan, others))


def test_table_of_paper_ours_and_difference():
    nan = float("nan")
    rows = [
        Result("BN", "acc", "62", "accuracy (%)", [60.0, 62.0], reduced="less"),
        Result("KN", "acc", "62", "accuracy (%)", [63.25], reduced="other"),
        Result("BN", "iters", "170k", "steps", [1e5, nan], "not reached", "less"),
        Result("KN", "iters", "", "steps", [nan], "not reached"),
        Result("GN", "acc", "91.3", "accuracy (%)"),
    ]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table(rows).splitlines()
    ]
    assert lines[2:] == [
        ["BN", "acc", "62", "61.00 ± 1.41", "2", "-1.00", "[1]"],
        ["KN", "acc", "62", "63.25", "1", "+1.25", "[2]"],
        ["BN", "iters", "170k", "100,000", "1 of 2", "-70,000", "[1]"],
        ["KN", "iters", "-", "not reached", "0 of 1", "-", "-"],
        ["GN", "acc", "91.3", "not run", "0", "-", "-"],
        ["[1] reduced: less"],
        ["[2] reduced: other"],
    ]


def test_differences_of_rows_are_taken_seed_by_seed():
    def found(row, *values):
        return Result(row, "accuracy", "", "accuracy (%)", values)

    rows = [found("BN", 1, 2), found("BKN", 3, 6), found("GN", 5, 0), found("GKN")]
    bkn, gkn = cifar.FIGURE4._differences(rows)
    assert (bkn.row, bkn.paper, bkn.values) == ("BKN - BN", "1.5", [2, 4])
    assert bkn.spread == (3, pytest.approx(2**0.5)) and bkn.difference == 1.5
    assert (gkn.row, gkn.paper, gkn.values) == ("GKN - GN", "0.4", [])


TINY = Trained(
    "tiny",
    tiny_config(),
    {("BN", "A"): "50"},
    {"BN": {"norm": "batch"}},
    {"A": Column(OPTION_A), "B": Column(OPTION_B)},
    Curve("test_moving_accuracy", "A", by_epoch=True),
)


def test_runs_what_is_missing(tmp_path, capsys):
    """And of all tables those that have their data."""
    request = Request("full", 1, tmp_path, "nowhere")
    with pytest.raises(FileNotFoundError, match="figure4 not run, for want of data"):
        reproduce_all(request, {"figure4": cifar.FIGURE4, "tiny": TINY})
    assert "not run: no cifar10 in nowhere/cifar10" in capsys.readouterr().out
    (first,) = tmp_path.glob("*/summary.json")
    before = first.stat().st_mtime_ns

    TINY.reproduce("tiny", request._replace(seeds=2))
    assert first.stat().st_mtime_ns == before
    accuracies = [
        json.loads((run_dir / "summary.json").read_text())["test_moving_accuracy"]
        for run_dir in sorted(tmp_path.glob("digits-cifar_resnet-batch-m2-*-seed[01]"))
    ]
    content = json.loads((tmp_path / "tiny.json").read_text())
    assert content["results"][0]["values"] == [100 * each for each in accuracies]
    with (tmp_path / "tiny.csv").open() as file:
        option_a, option_b = csv.DictReader(file)
    assert (option_a["paper"], option_b["paper"]) == ("50", "")
    assert float(option_a["difference"]) == pytest.approx(50 * sum(accuracies) - 50)
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")

    for left_out in (
        {"datasets": ["cifar10"]},
        {"networks": ["resnet50"]},
        {"norms": ["kalman"]},
        {"micro_batch_sizes": [128]},
    ):
        capsys.readouterr()
        TINY.reproduce("tiny", request._replace(**left_out))
        assert capsys.readouterr().out.count("not run") == 2


def test_speeds_and_their_ratio(tmp_path, monkeypatch):
    monkeypatch.setattr(table3, "NORMS", {"BN": "batch", "KN": "kalman_paper"})
    monkeypatch.setattr(table3, "_SMOKE", table3._SMOKE | {"width": 4, "image_size": 8})
    monkeypatch.setattr(table3, "ROUNDS", 2)
    table3.reproduce("table3", Request("smoke", workdir=tmp_path))
    found = json.loads((tmp_path / "table3.json").read_text())["results"]
    batch, kalman, ratio = (np.array(line["values"]) for line in found)
    assert [line["paper"] for line in found] == ["325.74", "320.94", "1.015"]
    assert batch.shape == (2,) and (batch > 0).all()
    np.testing.assert_allclose(ratio, batch / kalman)
    assert "batch_size 8 in place of 32" in found[2]["reduced"]


@pytest.mark.slow  # beside the tests of tests/train/analysis/test_statistics.py
def test_gaps_of_the_variance(tmp_path, monkeypatch):
    monkeypatch.setattr(figure5, "ROWS", {"BN": cifar.BN})
    figure5.reproduce("figure5", Request("smoke", 1, tmp_path, "nowhere"))
    with (tmp_path / "figure5_layers.csv").open() as file:
        gaps = {line["layer"]: float(line["gap"]) for line in csv.DictReader(file)}
    first, *others = gaps
    assert first == "stem_norm" and len(others) == 6  # in a ResNet-8
    with (tmp_path / "figure5.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert float(line["mean"]) == pytest.approx(np.mean(list(gaps.values())))
    assert (tmp_path / "figure5.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_table_needs(tmp_path):
    with pytest.raises(ValueError, match="trains networks; pass --workdir=DIR"):
        cifar.TABLE7.reproduce("table7", Request())
    with pytest.raises(FileNotFoundError, match="no imagenet2012 in nowhere"):
        REPRODUCTIONS["table1"].reproduce(
            "table1", Request("short", 1, tmp_path, "nowhere")
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["--list"], 0, "table8: CIFAR-10, CIFAR-100 and SVHN accuracy by normaliser"),
        (["table9"], 1, "'table1', 'table2', 'table3', 'table4', 'table5', 'table6'"),
        (["table6", "--workdir=nowhere"], 1, "table6 at full size lacks COCO 2017"),
    ],
)
def test_command(arguments, status, message):
    out = run("train.reproduce", *arguments, status=status)
    assert message in out and "Traceback" not in out
