"""The notebooks: every code cell, in order, in one process; and their links."""

import json
import pathlib
import re

import matplotlib
import pytest

NOTEBOOKS = sorted(pathlib.Path("examples").glob("*.ipynb"))


def cells(path, kind):
    """The sources of the cells of a kind, in order."""
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def run(path):
    """Runs the code cells, and returns the names that they leave."""
    matplotlib.use("Agg")
    names = {}
    for cell in cells(path, "code"):
        exec(compile(cell, str(path), "exec"), names)
    return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_code_without_outputs_and_links_lead_somewhere(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
    for cell in cells(path, "code"):
        compile(cell, str(path), "exec")
    for link in re.findall(r"\]\(([^)#:]+)\)", "".join(cells(path, "markdown"))):
        assert (path.parent / link).exists(), link


@pytest.mark.slow
def test_first_steps(capsys):
    names = run(pathlib.Path("examples/first_steps.ipynb"))
    assert "2 of 2 normalisers predicted" in capsys.readouterr().out
    assert names["accuracy"] > 0.8


@pytest.mark.slow
def test_choosing_a_normaliser():
    ends = {
        name: values[:, -1].mean()
        for name, values in run(pathlib.Path("examples/choosing_a_normaliser.ipynb"))[
            "results"
        ].items()
    }
    assert min(ends["kalman_wc"], ends["group_ws"]) > ends["batch"] + 20
