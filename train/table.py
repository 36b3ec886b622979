"""Prints one table of the runs that several comparison.csv hold.

    python -m train.table runs/seed0/comparison.csv runs/seed1/comparison.csv

For runs that were made on other days or machines; `train.compare` and a study of the
same config write these files. A run that stands in two of them counts once.
"""

import pathlib
import sys
from collections.abc import Iterable

import pandas as pd

from train import cli
from train.studies import report

#: what tells a run from the others of its config
NAMES = ["variant", "micro_batch_size", "seed"]
#: columns that runs of one config have in common
PROTOCOL = ["norm", "batch_size", "learning_rate", "parameters", "steps"]


def join(paths: Iterable[pathlib.Path]) -> list[report.Run]:
    """Returns the runs of all files, each once.

    Raises:
        ValueError: no file, one that is none of ours, or runs of the same variant and
            micro-batch size that are not of one config: of another batch, rate, network
            or length, or with other results of the same seed.
    """
    files = [report.read_csv(path).assign(path=str(path)) for path in paths]
    runs = pd.concat(files, ignore_index=True) if files else pd.DataFrame()
    if runs.empty:
        raise ValueError("no runs; name one comparison.csv or more.")
    # Whenever and wherever a run was made, it came to the same.
    results = runs.columns.difference([*PROTOCOL, "devices", "seconds", "path"])
    runs = runs.drop_duplicates([*NAMES, *results.difference(NAMES)])
    alive = runs[runs.final_train_loss.notna()]
    alike = alive.fillna({"parameters": -1, "steps": -1, "learning_rate": -1})
    first = alike.groupby(NAMES[:2], sort=False)[PROTOCOL].transform("first")
    other = (alike[PROTOCOL] != first).any(axis=1).reindex(runs.index, fill_value=False)
    for _, run in runs[runs.duplicated(NAMES) | other].iterrows():
        raise ValueError(
            f"{run.path} has other results of {run[NAMES].to_dict()} than a file"
            " before it, or results of another protocol: these are not runs of"
            " one config."
        )
    return report.from_frame(runs.drop(columns="path"))


def main(*paths: str) -> None:
    """Prints the table."""
    print(report.table(join(map(pathlib.Path, paths))))


if __name__ == "__main__":
    cli.run(main, positional=sys.maxsize)
