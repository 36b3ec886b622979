"""The documents: the code of the README and the guide, run as printed, in order; links;
that the pages of the API have every public name, and normalisers all their sections.

What loads an exported network (docs/export.md) is run in
`tests/train/commands/test_export.py`.
"""

import inspect
import pathlib
import re

import chex
import jax.numpy as jnp
import pytest

import kalman_flax as kf


def run(page):
    """Runs the code blocks of a page, and returns the names that they leave."""
    names = {}
    for block in re.findall(
        r"^```python\n(.*?)^```", pathlib.Path(page).read_text(), re.M | re.S
    ):
        exec(compile(block, page, "exec"), names)
    return names


def test_the_readme(capsys):
    names = run("README.md")
    chex.assert_shape(names["logits"], (2, 10))
    assert "2 of 2 normalisers predicted" in capsys.readouterr().out


def test_the_guide(capsys):
    names = run("docs/guide.md")
    assert "2 of 2 normalisers predicted" in capsys.readouterr().out
    assert [row.lost_at for row in names["report"].rows] == [None, None]
    network, variables = names["Net"](), names["variables"]
    logits = network.apply(variables, names["images"], True)
    chex.assert_trees_all_close(names["served"], logits, rtol=1e-4, atol=1e-5)
    chex.assert_shape(names["logits"], (64, 2, 10))
    chex.assert_trees_all_equal_shapes(names["batch_stats"], variables["batch_stats"])
    output = kf.filter.observe(names["y"])
    assert jnp.abs(output.mean).max() < 1 and jnp.abs(output.var - 1).max() < 1


def test_fine_tuning():
    names = run("docs/fine-tuning.md")
    before, after = names["checkpoint"]["params"], names["params"]
    chex.assert_trees_all_equal(after["conv0"], before["conv0"])
    assert jnp.abs(after["conv1"]["kernel"] - before["conv1"]["kernel"]).max() > 1e-5
    assert jnp.isfinite(names["value"])


@pytest.mark.parametrize(
    "page", ["README.md", *map(str, sorted(pathlib.Path("docs").rglob("*.md")))]
)
def test_links_lead_somewhere(page):
    page = pathlib.Path(page)
    text = re.sub(r"`[^`]*`", "", page.read_text())
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), f"{page}: {link}"


def test_the_api_pages_have_every_public_name():
    pages = "".join(page.read_text() for page in pathlib.Path("docs/api").glob("*.md"))
    documented = set(re.findall(r"^::: [\w.]*?(\w+)$", pages, re.M))
    detection = kf.models.detection
    rooms = (kf, kf.filter, kf.baselines, kf.models, detection, kf.inference, kf.nnx)
    public = {
        name
        for room in rooms
        for name, value in vars(room).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    } - {"Any"}
    assert public == documented


def test_public_names_have_docstrings_of_their_own():
    """`help` of a `functools.partial` would be that of partials."""
    for name, value in vars(kf).items():
        if callable(value) and not name.startswith("_") and name != "Any":
            assert inspect.isclass(value) or inspect.isroutine(value), name
            assert value.__doc__, name


NORMALIZERS = {
    name: value
    for room in (kf, kf.baselines)
    for name, value in vars(room).items()
    if inspect.isclass(value) and hasattr(value, "normalize")
}


@pytest.mark.parametrize("name", NORMALIZERS)
def test_docstrings_of_normalisers_have_their_sections(name):
    text = inspect.cleandoc(NORMALIZERS[name].__doc__)
    assert re.match(r"[^\n]+\.\n\n", text), "a summary of one line"
    assert re.search(r"^\$\$\n.+?\n\$\$$", text, re.M | re.S), "the formula"
    sections = re.findall(r"^([A-Z][a-z ]+):\n    ", text, re.M)
    # Attributes may be those of another class alone.
    required = ["Source", "Cost", "When to use", "Variables", "State", "Raises"]
    assert [part for part in sections if part != "Attributes"] == required
