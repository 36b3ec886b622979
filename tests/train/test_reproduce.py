"""The paper's tables beside ours."""

import csv

import pytest

from tests.train.test_commands import run
from train.reproductions import table2


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


@pytest.mark.parametrize("arguments, status", [(["--list"], 0), (["table9"], 1)])
def test_tables_are_listed(arguments, status):
    assert "table2" in run("train.reproduce", *arguments, status=status)
