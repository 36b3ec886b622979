"""Prints one table of the runs that several comparison.csv hold.

    python -m train.table runs/seed0/comparison.csv runs/seed1/comparison.csv

For runs that were made on other days or machines; `train.compare` and a study of the
same config write these files. A run that stands in two of them counts once.
"""

import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from train import cli
from train.studies import report

#: columns that runs of one config have in common
PROTOCOL = ("norm", "batch_size", "learning_rate", "parameters", "steps")


def join(paths: Iterable[pathlib.Path]) -> list[report.Run]:
    """Returns the runs of all files, each once.

    Raises:
        ValueError: no file, one that is none of ours, or runs of the same variant and
            micro-batch size that are not of one config: of another batch, rate, network
            or length, or with other results of the same seed.
    """
    runs: dict[tuple, report.Run] = {}
    rows: dict[tuple, dict[str, Any]] = {}
    for path in paths:
        for run in report.read_csv(path):
            names = "variant", "micro_batch_size", "seed"
            *row, _ = key = tuple(run.summary[name] for name in names)
            known = runs.setdefault(key, run)
            protocol = {name: run.summary.get(name) for name in PROTOCOL}
            alike = run.diverged or rows.setdefault(tuple(row), protocol) == protocol
            if results(known) != results(run) or not alike:
                raise ValueError(
                    f"{path} has other results of {dict(zip(names, key))} than a file"
                    " before it, or results of another protocol: these are not runs of"
                    " one config."
                )
    if not runs:
        raise ValueError("no runs; name one comparison.csv or more.")
    return list(runs.values())


def results(run: report.Run) -> list[float | None]:
    """What a run came to, whenever it was made."""
    columns = "test_moving_accuracy", "test_batch_accuracy", "final_train_loss"
    return [run.summary.get(column) for column in columns]


def main(*paths: str) -> None:
    """Prints the table."""
    print(report.table(join(map(pathlib.Path, paths))))


if __name__ == "__main__":
    cli.run(main, positional=sys.maxsize)
