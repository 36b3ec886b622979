"""Trains normalisers side by side and prints one table.

    python -m train.compare --config=configs/digits.py --norms=batch,group,kalman \\
        --micro_batch_sizes=2,32 --seeds=3 --workdir=runs/compare

Finished runs are kept and interrupted ones go on when the command runs again. Writes
comparison.csv, comparison.json (with command, hardware, versions) and comparison.png.
"""

import copy
import pathlib
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from kalman_flax import NORMALIZERS
from train import cli, report
from train import workdir as wd
from train.experiment import check
from train.loop import NonFiniteError, train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, a Python file.")
_NORMS = flags.DEFINE_list(
    "norms",
    ["batch", "kalman"],
    f"Normalisers: {', '.join(NORMALIZERS)}. batch@128 is run at that micro-batch size"
    " alone, whatever --micro_batch_sizes says.",
)
_MICRO_BATCH_SIZES = flags.DEFINE_list(
    "micro_batch_sizes", None, "Micro-batch sizes (default: the config's)."
)
_SEEDS = flags.DEFINE_integer(
    "seeds", 1, "Runs of each, with seeds from the config's upwards.", lower_bound=1
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of all runs.")


class Entry(NamedTuple):
    """A row of the table."""

    norm: str
    micro_batch_size: int


def parse_entries(norms: list[str], sizes: list[str]) -> list[Entry]:
    """Returns the rows for `norms`, ``name`` or ``name@size``, and micro-batch `sizes`.

    Raises:
        ValueError: a size that is not a positive number.
    """
    entries = []
    for norm in norms:
        name, at, own = norm.partition("@")
        for size in [own] if at else sizes:
            if not size.isdigit() or int(size) < 1:
                raise ValueError(
                    f"micro-batch size {size!r} of {name}; expected a positive number."
                )
            entries.append(Entry(name, int(size)))
    return list(dict.fromkeys(entries))


def configure(config: ConfigDict, entry: Entry, seed: int) -> ConfigDict:
    """Returns the config of one run."""
    config = copy.deepcopy(config)
    config.norm, config.micro_batch_size = entry
    config.seed += seed
    return config


def main() -> None:
    """Runs what is missing, prints the table, writes CSV, JSON and PNG."""
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
    sizes = _MICRO_BATCH_SIZES.value or [str(config.micro_batch_size)]
    runs = []
    entries = parse_entries(_NORMS.value, sizes)
    for entry in entries:  # not after hours of runs
        check(configure(config, entry, seed=0))
    for seed in range(_SEEDS.value):  # seeds outermost: half a table is a table too
        for entry in entries:
            run_config = configure(config, entry, seed)
            run_dir = workdir / (
                f"{entry.norm}-m{entry.micro_batch_size}-seed{run_config.seed}"
            )
            try:
                summary = train(run_config, run_dir, cli.DATA_DIR.value)
            except NonFiniteError as error:
                print(f"{run_dir.name} diverged: {error}")
                summary = {**entry._asdict(), "seed": run_config.seed, "diverged": True}
            runs.append(report.Run(summary, wd.read_metrics(run_dir)))
    print(report.table(runs))
    report.write_csv(workdir / "comparison.csv", runs)
    wd.write_json(
        workdir / "comparison.json",
        {
            **wd.provenance(),
            "config": config.to_dict(),
            "runs": [r.row() for r in runs],
        },
    )
    report.plot(workdir / "comparison.png", runs)
    print(f"written: {workdir}/comparison.csv, .json, .png")


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
