"""The paper's tables, each a module with a function ``reproduce``."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from train.reproductions import table2

#: By name. Each prints what the paper has beside ours and, given a directory, writes it
#: there; the first line of its docstring is what ``--list`` shows.
REPRODUCTIONS: dict[str, Callable[[pathlib.Path | None], None]] = {
    "table2": table2.reproduce,
}
