"""Tables of the documents, made of the ledger.

``docs/results/tables.toml`` declares them, each once::

    [ablation]
    where = {study = "ablation", micro_batch_size = 2}    # of all its cells
    head = ["variant"]                                    # of the columns of names
    columns = [{head = "A", show = "A"}, {head = "B", show = "B"}]
    rows = [["gain 0.1", {variant = "gain 0.1"}], ...]    # names, then which runs

A cell is made of the runs that fit the filters of the table, its row and its column. A
filter gives a column of the ledger one value or a list of values; a ``*`` at the end of
a text stands for whatever follows. A row with two filters is the difference of the
first and the second, seed by seed. More keys, of a table or a column:

- `show`, a key of `SHOWN`, and `digits`, the decimals;
- `seeds`, a number of runs that needs no word: a cell of fewer or more says so;
- `least`, how many runs a cell needs;
- of a table, `metric`, what A is in the place of the accuracy: `test_moving_miou`;
- of a table, `sort = "A"` puts the best first, `bold` marks the best of each ``"row"``
  or ``"column"``.

In a document a table stands between ``<!-- table: ablation -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import pathlib
import re
import tomllib
from collections.abc import Callable
from typing import Any

import pandas as pd

from train.studies.report import HEADLINE, markdown, mean_sd, options, plus_minus

OPTION_A, OPTION_B = options(HEADLINE)
#: points by which B differs from A to be worth its place
APART = 1.0

_MARKED = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.S)


def load(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Reads the declarations.

    Raises:
        ValueError: they are no TOML; the message names the file and the line.
    """
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}.") from error


def select(runs: pd.DataFrame, *filters: dict[str, Any]) -> pd.DataFrame:
    """Returns the runs that fit all filters, each once.

    Raises:
        ValueError: a filter names no column, or two runs of one seed came to different
            results, so that the filters do not say which is meant.
    """
    for column, wanted in (item for each in filters for item in each.items()):
        if column not in runs:
            raise ValueError(f"no column {column!r}; there are {list(runs.columns)}.")
        wanted = wanted if isinstance(wanted, list) else [wanted]
        fits = runs[column].isin(wanted)
        for text in wanted:
            if isinstance(text, str) and text.endswith("*"):
                fits |= runs[column].str.startswith(text[:-1])
        runs = runs[fits]
    # The same run may stand in two studies.
    runs = runs.drop_duplicates(["seed", OPTION_A, OPTION_B, "final_train_loss"])
    if runs.seed.duplicated().any():
        twice = runs[runs.seed.duplicated(keep=False)]
        raise ValueError(
            f"several runs of one seed fit {filters}; say which:\n"
            f"{twice[['study', 'variant', 'seed', OPTION_A]].to_string()}"
        )
    return runs


def _percent(runs: pd.DataFrame, column: str, form: str) -> str:
    return plus_minus(mean_sd(runs[column].dropna().to_list()), form)


def _both(runs: pd.DataFrame, form: str) -> str:
    cells = [_percent(runs, column, form) for column in (OPTION_A, OPTION_B)]
    return " / ".join(cell for cell in cells if cell != "-")


def _both_if_apart(runs: pd.DataFrame, form: str) -> str:
    gap = 100 * abs(runs[OPTION_A].mean() - runs[OPTION_B].mean())
    return _both(runs, form) if gap > APART else _percent(runs, OPTION_A, form)


#: what a cell shows of its runs, by the name in `show`; shares of 1 as `form` has it
SHOWN: dict[str, Callable[[pd.DataFrame, str], str]] = {
    "A": lambda runs, form: _percent(runs, OPTION_A, form),
    "B": lambda runs, form: _percent(runs, OPTION_B, form),
    "A / B": _both,
    "A, B if apart": _both_if_apart,
    "seeds": lambda runs, _: str(len(runs)),
    "training loss": lambda runs, _: plus_minus(
        (runs.final_train_loss.mean(), float("nan")), "{:.3f}"
    ),
}
#: those of which the best may be marked
_MARKED_BOLD = ("A", "B", "A / B", "A, B if apart")


def render(table: dict[str, Any], runs: pd.DataFrame) -> str:
    """Returns a declared table as Markdown.

    Raises:
        ValueError: no run fits a row.
    """
    if "metric" in table:
        moving, batch = options(table["metric"])
        runs = runs.assign(**{OPTION_A: runs[moving], OPTION_B: runs[batch]})
    columns = [table | column for column in table["columns"]]
    names, found = [], []
    for row in table["rows"]:
        filters = [each for each in row if isinstance(each, dict)]
        names.append([each for each in row if not isinstance(each, dict)])
        found.append([_runs_of(runs, table, filters, c) for c in table["columns"]])
        if all(cell.empty for cell in found[-1]):
            raise ValueError(f"no run fits the row {names[-1]} with {filters}.")
    means = pd.DataFrame(
        [[_mean(cell, column) for cell, column in zip(row, columns)] for row in found]
    )
    bold = table.get("bold")
    best = means.eq(
        means.max(axis=1) if bold == "row" else means.max(),
        axis="index" if bold == "row" else "columns",
    )
    texts = [
        [
            f"**{text}**" if bold and best.iloc[i, j] else text
            for j, text in enumerate(map(_cell, row, columns))
        ]
        for i, row in enumerate(found)
    ]
    order = means.index
    if "sort" in table:
        order = means[0].sort_values(ascending=False, kind="stable").index
    head = [*table["head"], *(column["head"] for column in columns)]
    return markdown([head] + [[*names[i], *texts[i]] for i in order])


def _runs_of(
    runs: pd.DataFrame,
    table: dict[str, Any],
    filters: list[dict[str, Any]],
    column: dict[str, Any],
) -> pd.DataFrame:
    """Returns the runs of a cell; of a row with two filters, the differences of the
    runs of the first and of the second, seed by seed."""
    # A column's filter takes the place of the row's, the row's of the table's.
    chosen = [
        select(runs, table.get("where", {}) | which | column.get("where", {}))
        for which in filters
    ]
    if len(chosen) == 1:
        return chosen[0]
    numbers = [OPTION_A, OPTION_B, "final_train_loss"]
    one, other = (each.set_index("seed")[numbers] for each in chosen)
    return (one - other).reset_index().assign(difference=True)


def _mean(runs: pd.DataFrame, column: dict[str, Any]) -> float:
    """Returns the number to find the best of a row or column by."""
    shown = column.get("show", "A")
    if shown not in _MARKED_BOLD:
        return float("nan")
    return runs[OPTION_B if shown == "B" else OPTION_A].mean()


def _cell(runs: pd.DataFrame, column: dict[str, Any]) -> str:
    if len(runs) < column.get("least", 1):
        return "-"
    sign = "+" if "difference" in runs else ""
    shown = column.get("show", "A")
    text = SHOWN[shown](runs, f"{{:{sign}.{column.get('digits', 1)}%}}")
    if shown in _MARKED_BOLD and len(runs) != column.get("seeds", len(runs)):
        text += f" ({len(runs)} seed{'s' * (len(runs) > 1)})"
    return text


def rewrite(text: str, made: Callable[[str], str]) -> str:
    """Returns a document with its marked tables made anew.

    Args:
        text: the document.
        made: gives a table by its name.
    """

    def replace(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        return f"{start}\n{made(name)}\n\n{end}"

    return _MARKED.sub(replace, text)
