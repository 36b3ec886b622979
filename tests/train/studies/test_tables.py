"""Tables of the documents, from the ledger of runs."""

import pathlib

import pandas as pd
import pytest

from train import results
from train.studies import ledger, measurements, tables

DOCS = pathlib.Path("docs")


def made(*rows):
    columns = ["study", "norm", "micro_batch_size", "seed", tables.OPTION_A]
    runs = pd.DataFrame(rows, columns=columns)
    runs[tables.OPTION_B] = runs[tables.OPTION_A] - 0.02
    return runs.assign(variant="", final_train_loss=[1.5] * len(runs))


RUNS = made(
    ("a", "batch", 1, 0, 0.40),
    ("a", "batch", 1, 1, 0.43),
    ("a", "batch", 2, 0, 0.50),
    ("a/more", "kalman", 1, 0, 0.60),
    ("a/more", "kalman", 1, 1, 0.70),
    ("b", "kalman", 1, 1, 0.70),  # the same run in another study
    ("b", "kalman", 2, 0, 0.40125),
)


def rendered(**table):
    lines = tables.render(table, RUNS).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_cells_are_means_and_deviations_of_the_runs_that_fit():
    head, _, *rows = rendered(
        head=["norm"],
        seeds=2,
        bold="row",
        columns=[
            {"head": "1", "where": {"micro_batch_size": 1}},
            {"head": "2", "where": {"micro_batch_size": 2}, "show": "A / B"},
            {"head": "n", "show": "seeds", "where": {"micro_batch_size": 1}},
            {"head": "4", "where": {"micro_batch_size": 4}},
        ],
        rows=[["BN", {"norm": "batch"}], ["KN", {"norm": "kalman"}]],
    )
    assert head == ["norm", "1", "2", "n", "4"]
    # By hand: the sample deviation of two is their distance over the root of 2.
    assert rows == [
        ["BN", "41.5 ± 2.1", "**50.0 / 48.0 (1 seed)**", "2", "-"],
        ["KN", "**65.0 ± 7.1**", "40.1 / 38.1 (1 seed)", "2", "-"],
    ]


def test_the_best_stands_first_and_is_marked():
    _, _, *rows = rendered(
        head=[""],
        where={"micro_batch_size": 1},
        sort="A",
        bold="column",
        columns=[{"head": "A", "digits": 2}, {"head": "B", "show": "B"}],
        rows=[["BN", {"norm": "batch"}], ["KN", {"study": "a/*"}]],
    )
    assert rows == [
        ["KN", "**65.00 ± 7.07**", "**63.0 ± 7.1**"],
        ["BN", "41.50 ± 2.12", "39.5 ± 2.1"],
    ]


def test_a_table_may_be_of_another_metric():
    runs = RUNS.assign(test_moving_miou=0.25, test_batch_miou=0.125)
    table = dict(
        head=[""],
        metric="test_moving_miou",
        columns=[{"head": "", "show": "A / B"}],
        rows=[["BN", {"norm": "batch", "micro_batch_size": 2}]],
    )
    assert "25.0 / 12.5" in tables.render(table, runs)


def test_differences_are_taken_seed_by_seed():
    _, _, (_, cell) = rendered(
        head=[""],
        where={"micro_batch_size": 1},
        columns=[{"head": "A"}],
        rows=[["gap", {"norm": "kalman"}, {"norm": "batch"}]],
    )
    assert cell == "+23.5 ± 4.9"  # 20 and 27


def test_halves_are_rounded_up_whatever_the_float():
    table = {
        "head": [""],
        "columns": [{"head": "A", "digits": 2}],
        "rows": [["", {"study": "b", "micro_batch_size": 2}]],
    }
    assert "40.13" in tables.render(table, RUNS)  # 40.125, not 40.12


@pytest.mark.parametrize(
    "row, message",
    [
        ({"norm": "group"}, "no run fits the row"),
        ({"nrom": "batch"}, "no column 'nrom'"),
        ({"norm": "batch"}, "several runs of one seed"),
    ],
)
def test_filters_that_do_not_say_what_is_meant(row, message):
    table = {"head": [""], "columns": [{"head": "A"}], "rows": [["x", row]]}
    with pytest.raises(ValueError, match=message):
        tables.render(table, RUNS)


def test_tables_between_marks_are_made_anew():
    table = {
        "head": [""],
        "columns": [{"head": "A"}],
        "rows": [["KN", {"study": "a/more"}]],
    }
    text = "before\n<!-- table: t -->\nold\n<!-- end -->\nafter\n"

    def made(name):
        assert name == "t"
        return tables.render(table, RUNS)

    anew = tables.rewrite(text, made)
    assert "65.0 ± 7.1" in anew and "old" not in anew
    assert anew.startswith("before\n") and anew.endswith("<!-- end -->\nafter\n")
    assert tables.rewrite(anew, made) == anew
    with pytest.raises(ValueError, match="no table 't' is declared"):
        results.made(DOCS / "results", "t")


def test_documents_say_what_the_results_say(tmp_path):
    """The check of `python -m train.results --check`, and that it finds a wrong one."""
    assert not results.outdated(DOCS)
    declared = tables.load(DOCS / "results/tables.toml")["table"]
    texts = [path.read_text() for path in results.documents(DOCS)]
    for name in declared:
        assert any(f"<!-- table: {name} -->" in text for text in texts), name

    copy = tmp_path / "docs"
    (copy / "results").mkdir(parents=True)
    for file in (
        "tables.toml",
        *(f"{name}.csv" for name in measurements.FILES),
    ):
        (copy / "results" / file).write_text((DOCS / "results" / file).read_text())
    readme = tmp_path / "README.md"
    readme.write_text(f"<!-- table: {name} -->\nan old one\n<!-- end -->\n")
    assert [*results.outdated(copy)] == [readme]


def test_the_ledger_is_sound():
    runs = ledger.read(DOCS / "results")
    commands = pd.read_csv(DOCS / "results" / ledger.COMMANDS)
    assert len(runs) >= 594 and commands.command_hash.is_unique
    assert set(runs.command_hash) - {""} <= set(commands.command_hash)
    assert not runs.duplicated([*ledger.RUN_KEYS]).any()
    for name in set(runs.experiment):
        assert pathlib.Path(f"configs/experiments/{name}.py").exists()
    accuracies = runs[[tables.OPTION_A, tables.OPTION_B]]
    assert accuracies.min().min() >= 0 and accuracies.max().max() <= 1
    moving = runs.filter(regex="^test_moving_")  # accuracy, or mIoU
    assert (runs.diverged == moving.isna().all(axis=1)).all()


def test_timings_are_set_beside_those_of_flax():
    rows = pd.DataFrame(
        {
            "variant": ["flax", "kalman"],
            "seconds": [0.5, 0.25],
            "step_ratio": [1.0, 0.515],
            "step_ratio_low": [1.0, 0.4],
            "step_ratio_high": [1.0, 0.6],
            "kernels": [1100, 2200],
        }
    )
    flax = {"variant": "flax"}
    columns = [
        {"show": "number", "column": "seconds", "times": 1000, "unit": " ms"},
        {"show": "ratio", "column": "seconds", "digits": 1},
        {"show": "quartiles", "column": "step_ratio"},
        {"show": "both", "column": "kernels", "digits": 0},
        {"show": "number", "column": "kernels", "over": "seconds", "which": flax},
    ]
    columns = [{"head": "x"} | column for column in columns]
    table = {"head": [""], "columns": columns, "rows": [["KN", {"variant": "kalman"}]]}
    cells = measurements.render(table, rows).splitlines()[2].split("|")[1:-1]
    assert [cell.strip() for cell in cells] == [
        "KN",
        "250.00 ms",
        "0.5",
        "0.52 (0.40 to 0.60)",
        "1,100, 2,200",
        "2,200.00",
    ]
    table["rows"] = [["GN", {"variant": "group"}]]
    with pytest.raises(ValueError, match="0 rows fit"):
        measurements.render(table, rows)


def test_a_cell_of_text_has_the_entries_of_its_row():
    table = dict(head=["layer"], columns=[{"head": "a", "show": "text"}], digits=1)
    table |= dict(text="{mean} and {var}", rows=[["all", {"layer": "all"}]])
    rows = pd.DataFrame([dict(layer="all", mean=0.25, var=1234.56)])
    assert "| 0.3 and 1,234.6 |" in measurements.render(table, rows)


def test_damaged_declarations_name_their_file(tmp_path):
    (tmp_path / "tables.toml").write_text("[table.a]\nhead = [")
    with pytest.raises(ValueError, match=r"tables\.toml is no TOML: .*at end"):
        tables.load(tmp_path / "tables.toml")
