"""Tables and figures of networks to be trained: their runs, what is read of them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

from train.paper import picture, result
from train.paper.measure import Measure
from train.paper.printed import Grid
from train.paper.result import OURS
from train.paper.scale import reduced, scaled
from train.studies import report
from train.studies.runs import Entry, Job, configure, run_all

Cell = TypeVar("Cell")


class Request(NamedTuple):
    """What a user asks of a table.

    Attributes:
        scale: one of `SCALES`.
        seeds: runs of each network.
        workdir: gets a directory for each run, and the tables.
        data_dir: see `train.data.sets.load_dataset`.
        datasets: those to train on; what needs another is left out. None: all.
        networks: those to train, as at full size; None: all.
        norms: those to train with; None: all.
        micro_batch_sizes: likewise.
        init_from: of Table 6 at full size: the ResNet-50s to fine-tune, pre-trained
            with batch norm and with group norm.
    """

    scale: str = "full"
    seeds: int = 1
    workdir: pathlib.Path | None = None
    data_dir: str | None = None
    datasets: list[str] | None = None
    networks: list[str] | None = None
    norms: list[str] | None = None
    micro_batch_sizes: list[int] | None = None
    init_from: Sequence[str] = ()

    @property
    def folder(self) -> pathlib.Path:
        """The workdir.

        Raises:
            ValueError: there is none.
        """
        if self.workdir is None:
            raise ValueError(
                "this trains networks; pass --workdir=DIR to keep them in."
            )
        return self.workdir

    def wants(self, full: ConfigDict) -> bool:
        """Whether a run of the paper is asked for."""
        allowed = (
            (self.datasets, full.dataset),
            (self.networks, full.network),
            (self.norms, full.norm),
            (self.micro_batch_sizes, full.micro_batch_size),
        )
        return all(values is None or value in values for values, value in allowed)


class Series(NamedTuple):
    """Runs that differ in the seed alone.

    Attributes:
        full: as the paper has them.
        config: as they were run.
        runs, dirs: one for each seed.
    """

    full: ConfigDict
    config: ConfigDict
    runs: list[report.Run]
    dirs: list[pathlib.Path]

    def described(self) -> dict[str, Any]:
        """Returns the attributes of a `Result` that say what was run."""
        return describe(self.full, self.config)


def describe(full: ConfigDict, config: ConfigDict) -> dict[str, Any]:
    """Returns the attributes of a `Result` that say what was run in place of `full`."""
    keys = ("norm", "network", "dataset", "batch_size", "micro_batch_size")
    facts = {key: config[key] for key in keys}
    return {"reduced": reduced(full, config), "facts": facts}


def name_of(config: ConfigDict) -> str:
    """Returns what the directories of a run are called: the same in every table."""
    return (
        f"{config.dataset}-{config.network}-{config.norm}-m{config.micro_batch_size}"
        f"-b{config.batch_size}-e{config.epochs}"
    )


def train_all(
    request: Request,
    wanted: dict[Cell, ConfigDict],
    scale: Callable[[ConfigDict, str, str | None], ConfigDict] = scaled,
) -> dict[Cell, Series]:
    """Runs what is missing of `wanted`, full configs, and returns them, but for those
    that `request` does not want.

    Args:
        request: of a user.
        wanted: the runs.
        scale: cuts a run down, as `scaled` does.

    Raises:
        ValueError: no workdir, or a bad config.
        FileNotFoundError: a data set is not there; said before anything is run.
    """
    folder = request.folder
    configs = {
        cell: scale(full, request.scale, request.data_dir)
        for cell, full in wanted.items()
        if request.wants(full)
    }
    by_name = {name_of(config): config for config in configs.values()}
    jobs = []
    for seed in range(request.seeds):  # outermost: half a table is a table too
        for name, config in by_name.items():
            config = configure(config, Entry(name, {}), seed)
            run_dir = folder / f"{name}-seed{config.seed}"
            jobs.append(Job(config, name, run_dir))
    found = {name: ([], []) for name in by_name}
    for job, run in zip(jobs, run_all(jobs, request.data_dir)):
        runs, dirs = found[job.variant]
        runs.append(run)
        dirs.append(job.run_dir)
    return {
        cell: Series(wanted[cell], config, *found[name_of(config)])
        for cell, config in configs.items()
    }


def result_of(
    row: str, column: str, paper: str, measure: Measure, series: Series | None
) -> result.Result:
    """Returns what the runs of a cell came to; None for runs that were not wanted."""
    found = result.Result(row, column, paper, measure.unit)
    if series is None:
        return found
    return found._replace(
        values=measure.values(series.runs),
        missing=measure.missing,
        **series.described(),
    )


class Column(NamedTuple):
    """What a column reads of its runs, and the config keys that it sets."""

    measure: Measure
    keys: dict[str, Any] = {}  # noqa: RUF012


@dataclasses.dataclass(frozen=True)
class Trained:
    """A table, or a figure with `curve`, of the paper.

    A run is that of a row and a column, where the paper prints something; of a figure,
    all are. Printed rows called ``X - Y`` are the differences of two others.

    Attributes:
        title: what ``--list`` shows.
        config: that all runs start from, at full size.
        printed: the paper's numbers.
        rows: by name, the config keys that they set. What ends in `OURS` stands beside
            the number of the row without that.
        columns: by name. What follows a comma there is how we read the paper where it
            leaves that open; several readings stand beside its one number.
        curve: to be drawn, or None.
    """

    title: str
    config: ConfigDict
    printed: Grid
    rows: dict[str, dict[str, Any]]
    columns: dict[str, Column]
    curve: picture.Curve | None = None

    def cells(self) -> dict[tuple[str, str], ConfigDict]:
        """Returns the full config of each cell that has a run."""
        configs = {
            (row, name): configure(self.config, Entry(row, keys | column.keys), seed=0)
            for row, keys in self.rows.items()
            for name, column in self.columns.items()
        }
        needed = {
            name_of(config)
            for cell, config in configs.items()
            if self.curve or self._paper(*cell)
        }
        return {cell: c for cell, c in configs.items() if name_of(c) in needed}

    def reproduce(self, name: str, request: Request) -> None:
        """Trains what is missing, prints the table, writes CSV, JSON and PNG."""
        cells = self.cells()
        series = train_all(request, cells)
        results = [self._result(*cell, series.get(cell)) for cell in cells]
        results += self._differences(results)
        print(result.table(results))
        result.write(request.folder, name, results, scale=request.scale)
        lines = {row: each for (row, _), each in series.items()}
        path = request.folder / f"{name}.png"
        picture.plot(path, results, lines, self.curve)
        print(f"written: {request.folder}/{name}.csv, .json, .png")

    def _paper(self, row: str, column: str) -> str:
        return self.printed.get((row.removesuffix(OURS), column.split(", ")[0]), "")

    def _result(self, row: str, column: str, series: Series | None) -> result.Result:
        measure = self.columns[column].measure
        return result_of(row, column, self._paper(row, column), measure, series)

    def _differences(self, results: list[result.Result]) -> list[result.Result]:
        by_cell = {(each.row, each.column): each for each in results}
        differences = []
        for (row, column), paper in self.printed.items():
            if " - " in row:
                one, other = (by_cell[part, column] for part in row.split(" - "))
                gaps = [a - b for a, b in zip(one.values, other.values)]
                differences.append(one._replace(row=row, paper=paper, values=gaps))
        return differences
