"""Prints a table of the paper beside ours.

python -m train.reproduce --list
python -m train.reproduce table2 --workdir=runs/table2
"""

import pathlib

from absl import flags

from kalman_flax.state import check_choice
from train import cli
from train.reproductions import REPRODUCTIONS

_LIST = flags.DEFINE_bool("list", False, "Say which tables there are.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Also write the table there, as CSV.")


def main(name: str | None = None) -> None:
    """Lists the tables, or reproduces the one of that name."""
    if _LIST.value:
        for known, reproduce in REPRODUCTIONS.items():
            print(f"{known}: {reproduce.__doc__.splitlines()[0]}")
        return
    check_choice("the table", name, REPRODUCTIONS)
    REPRODUCTIONS[name](pathlib.Path(_WORKDIR.value) if _WORKDIR.value else None)


if __name__ == "__main__":
    cli.run(main, positional=1)
