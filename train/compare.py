"""Trains normalisers, or the variants of a study, side by side and prints one table.

    python -m train.compare --config=configs/experiments/digits.py \\
        --norms=batch,group,kalman --micro_batch_sizes=2,32 --seeds=3 \\
        --workdir=runs/compare

A config that lists variants is a study, and needs no --norms:

    python -m train.compare --config=configs/studies/ablation.py \\
        --workdir=runs/ablation --data_dir=DIR

Finished runs are kept and interrupted ones go on when the command runs again. Writes
comparison.csv, comparison.json (with command, hardware, versions) and comparison.png.
"""

import re
from collections.abc import Iterable

from absl import flags
from ml_collections import ConfigDict

from configs import base
from kalman_flax import NORMALIZERS
from train import cli
from train.engine import workdir as wd
from train.studies import figure, ledger, report
from train.studies.runs import Entry, Job, configure, run_all

_CONFIG = cli.define_config()
_NORMS = flags.DEFINE_list(
    "norms",
    None,
    f"Normalisers: {', '.join(NORMALIZERS)}; with standardised kernels NAME_ws, with"
    " centred ones NAME_wc."
    " batch@128 is run at that micro-batch size alone, whatever --micro_batch_sizes"
    " says. Default: the variants of the config, or batch,kalman if it has none.",
)
_VARIANTS = flags.DEFINE_list(
    "variants", None, "Of a study, the variants to run (default: all)."
)
_MICRO_BATCH_SIZES = flags.DEFINE_list(
    "micro_batch_sizes",
    None,
    "Micro-batch sizes of --norms, and of variants that set none (default: the"
    " config's).",
)
_SEEDS = flags.DEFINE_integer(
    "seeds", 1, "Runs of each, with seeds from the config's upwards.", lower_bound=1
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of all runs.", required=True)


def parse_norm(text: str) -> Entry:
    """Returns the entry of ``name`` or ``name@size``, an item of --norms."""
    name, at, size = text.partition("@")
    return Entry(name, {"norm": name} | (_micro_batch(size) if at else {}))


def chosen(study: list[Entry], names: list[str] | None) -> list[Entry]:
    """Returns the entries of a study that are named; all for None.

    Raises:
        ValueError: an unknown name.
    """
    known = list(dict.fromkeys(entry.variant for entry in study))
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"unknown variants {unknown}; the config has {known}.")
    return [entry for entry in study if names is None or entry.variant in names]


def check_overrides(entries: list[Entry], keys: Iterable[str]) -> None:
    """Refuses flags for `keys` of the config that each of `entries` sets itself.

    Raises:
        ValueError: there is one, which would do nothing.
    """
    for key in keys:
        name = key.partition(".")[0]  # a row replaces nested options as a whole
        if all(name in entry.overrides for entry in entries):
            raise ValueError(
                f"a flag sets {key}, which would change nothing: every row of the table"
                " sets it itself. Leave the flag out, or choose other rows."
            )


def at_sizes(entries: Iterable[Entry], sizes: list[str]) -> list[Entry]:
    """Returns the rows of the table: `entries` that set no micro-batch size of their
    own stand there once for each of `sizes`."""
    return [
        Entry(variant, overrides | size)
        for variant, overrides in entries
        for size in (
            [{}]
            if "micro_batch_size" in overrides
            else [_micro_batch(size) for size in dict.fromkeys(sizes)]
        )
    ]


def _micro_batch(size: str) -> dict[str, int]:
    return {"micro_batch_size": cli.micro_batch_size(size)}


def main() -> None:
    """Runs what is missing, prints the table, writes CSV, JSON and PNG."""
    config, workdir = _CONFIG.value, cli.path(_WORKDIR)
    base.check(config)
    norms, sizes = _NORMS.value, _MICRO_BATCH_SIZES.value
    study = [Entry(*variant) for variant in config.variants]
    entries = chosen(study, _VARIANTS.value)
    if norms or not entries:
        entries = [parse_norm(text) for text in norms or ("batch", "kalman")]
    set_by_flags = cli.config_keys()
    if sizes:
        set_by_flags.append("micro_batch_size")
    check_overrides(entries, set_by_flags)
    entries = at_sizes(entries, sizes or [str(config.micro_batch_size)])
    jobs = []
    for seed in range(_SEEDS.value):  # seeds outermost: half a table is a table too
        for entry in entries:
            run_config = configure(config, entry, seed)
            run_dir = workdir / _run_dir(run_config, entry.variant)
            jobs.append(Job(run_config, entry.variant, run_dir))
    runs = run_all(jobs, cli.DATA_DIR.value)
    print(report.table(runs))
    report.write_csv(workdir / "comparison.csv", runs)
    shared = {key: v for key, v in config.to_dict().items() if key != "variants"}
    rows = [  # each with what it changes of the config
        run.row() | {"config": ledger.changed(job.config.to_dict(), shared)}
        for run, job in zip(runs, jobs)
    ]
    content = {**wd.provenance(), "config": shared, "runs": rows}
    wd.write_json(workdir / "comparison.json", content)
    figure.plot(workdir / "comparison.png", runs)
    print(f"written: {workdir}/comparison.csv, .json, .png")


def _run_dir(config: ConfigDict, variant: str) -> str:
    name = re.sub(r"[^\w.=-]+", "_", variant)
    return f"{name}-m{config.micro_batch_size}-seed{config.seed}"


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    flags.mark_flag_as_required("config")
    cli.run(main)
