"""Makes the tables and pictures of the documents from docs/results; adds runs to it.

    python -m train.results                          # rewrites tables and pictures
    python -m train.results --check                  # exits 1 if a table differs
    python -m train.results add runs/compare --study=my_study

docs/results/runs.csv has a row for every run that a document quotes, and
docs/results/tables.toml says what tables and pictures are made of which. `add` takes
the directory of `train.compare` or of a single run; a run that is there already is not
added again.
"""

import functools
import pathlib

from absl import flags

from train import cli
from train.studies import ledger, measurements, pictures, tables

_DOCS = flags.DEFINE_string("docs", "docs", "The folder of the documents.")
_CHECK = flags.DEFINE_bool(
    "check", False, "Write nothing; exit 1 if a document differs from its results."
)
_STUDY = flags.DEFINE_string("study", None, "Of `add`: what the runs belong to.")


def documents(docs: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that may have tables: the README and all in the folder."""
    return [docs.parent / "README.md", *sorted(docs.rglob("*.md"))]


def made(folder: pathlib.Path, name: str) -> str:
    """Returns a table that tables.toml in the folder of results declares.

    Raises:
        ValueError: it declares none of that name, or a bad one.
    """
    declared = tables.load(folder / "tables.toml")["table"]
    if name not in declared:
        raise ValueError(f"no table {name!r} is declared; there are {[*declared]}.")
    if (file := declared[name].get("of")) is not None:
        return measurements.render(declared[name], measurements.read(folder, file))
    return tables.render(declared[name], ledger.read(folder))


def outdated(docs: pathlib.Path) -> dict[pathlib.Path, str]:
    """Returns the documents whose tables are not those of the results, made anew."""
    made_here = functools.partial(made, docs / "results")
    anew = {
        path: tables.rewrite(path.read_text(), made_here) for path in documents(docs)
    }
    return {path: text for path, text in anew.items() if text != path.read_text()}


def main(action: str | None = None, source: str | None = None) -> None:
    """Rewrites or checks the documents, or adds runs."""
    docs = pathlib.Path(_DOCS.value)
    if action is not None:
        if action != "add" or source is None or not _STUDY.value:
            raise ValueError(
                f"{action!r} is no action; to add runs: add DIR --study=NAME."
            )
        added = ledger.add(docs / "results", pathlib.Path(source), _STUDY.value)
        print(f"{added} runs added to {docs / 'results' / ledger.RUNS}")
        return
    changed = outdated(docs)
    if _CHECK.value:
        if changed:
            raise ValueError(
                f"tables in {', '.join(map(str, changed))} are not those of the"
                " results; run python -m train.results."
            )
        return
    for path, text in changed.items():
        path.write_text(text)
    declared = tables.load(docs / "results" / "tables.toml")["picture"]
    drawn = pictures.draw(declared, ledger.read(docs / "results"), docs / "pictures")
    print(f"written: {', '.join(map(str, [*changed, *drawn]))}")


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    cli.run(main, positional=2)
