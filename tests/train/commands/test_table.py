"""Runs of several comparison.csv in one table."""

import pytest

from train import table
from train.studies import report


def run(seed, **results):
    summary = {"variant": "kalman", "norm": "kalman", "micro_batch_size": 2} | results
    return report.Run(summary | {"seed": seed, "batch_size": 128}, [])


def accuracy(value):
    return dict(
        test_moving_accuracy=value,
        test_batch_accuracy=value,
        final_train_loss=1.5,
        seconds=1.0,
    )


def written(path, *runs):
    report.write_csv(path, runs)
    return path


def test_runs_of_two_files_stand_in_one_row(tmp_path):
    first = written(tmp_path / "a.csv", run(0, **accuracy(0.4)), run(1, diverged=True))
    second = written(
        tmp_path / "b.csv", run(0, **accuracy(0.4)), run(2, **accuracy(0.5))
    )
    runs = table.join([first, second])
    assert [each.summary["seed"] for each in runs] == [0, 1, 2]
    (row,) = report.table(runs).splitlines()[2:]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[0] == "kalman"
    assert cells[4] == "3, 1 diverged"
    assert cells[5] == "45.00 ± 7.07"


def test_runs_of_different_configs_are_refused(tmp_path):
    first = written(tmp_path / "a.csv", run(0, **accuracy(0.4)))
    second = written(tmp_path / "b.csv", run(0, **accuracy(0.6)))
    with pytest.raises(ValueError, match=r"b\.csv has other results .*'seed': 0"):
        table.join([first, second])
    for other in ({"parameters": 9}, {"steps": 7}, {"learning_rate": 0.2}):
        longer = written(tmp_path / "c.csv", run(1, **accuracy(0.4), **other))
        with pytest.raises(ValueError, match="or results of another protocol"):
            table.join([first, longer])


def test_other_files_are_refused(tmp_path):
    (tmp_path / "c.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        ValueError, match=r"columns \['a', 'b'\]; expected a comparison"
    ):
        table.join([tmp_path / "c.csv"])
    for damage in (b"", b'a,b\n"', b"\xff\xfe\x00"):
        (tmp_path / "c.csv").write_bytes(damage)
        with pytest.raises(ValueError, match=r"c\.csv"):
            table.join([tmp_path / "c.csv"])
    with pytest.raises(ValueError, match="no runs"):
        table.join([])
