"""The ledger of all runs that the documents quote: ``docs/results/runs.csv``.

A row is a run. `experiment` is the file of ``configs/experiments`` that it is nearest
to, `config` the keys that differ from it, as JSON; those that have columns of their own
are not repeated there. ``commands.csv`` has command, hardware, versions and commit by
`command_hash`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pathlib
import pkgutil
from collections import Counter
from typing import Any

import pandas as pd

from configs import experiments
from train.engine.average_precision import NUMBERS
from train.engine.files import read_json
from train.studies.report import has_result

RUNS, COMMANDS = "runs.csv", "commands.csv"
#: of COCO's twelve numbers all but AP and AP50, which are not kept
_LEFT_OUT = tuple(f"_{name}" for name in NUMBERS if name not in ("AP", "AP50"))
_MEND = "run its command again, which writes it anew"
#: what a run was; two rows that agree in all of these are the same run
RUN_KEYS = (
    "study",
    "variant",
    "experiment",
    "config",
    "norm",
    "batch_size",
    "micro_batch_size",
    "learning_rate",
    "devices",
    "seed",
)
#: keys of a config that change no result
_REPORTING = {
    "checkpoint_epochs",
    "data_workers",
    "debug_nans",
    "eval_batch_size",
    "eval_epochs",
    "log_steps",
    "profile_steps",
    "variants",
}


def read(folder: pathlib.Path) -> pd.DataFrame:
    """Returns the ledger in a folder, a row a run; texts that are not there are empty,
    numbers NaN."""
    runs = pd.read_csv(folder / RUNS, low_memory=False)
    texts = runs.select_dtypes(exclude=["number", "bool"]).columns
    return runs.fillna(dict.fromkeys(texts, ""))


def add(folder: pathlib.Path, source: pathlib.Path, study: str) -> int:
    """Appends the runs of `source` that are not yet in the ledger; returns how many.

    Args:
        folder: of the ledger.
        source: the directory of a run, which has a summary.json, or of a comparison or
            study, which has a comparison.json; or such a file.
        study: what the runs belong to, the column to find them by.

    Raises:
        ValueError: `source` is none of these, or the ledger has other results of the
            same run.
    """
    found, provenance = _runs_of(source)
    command = _command(provenance)
    ledger, commands = (
        pd.read_csv(folder / name, dtype=str, keep_default_na=False)
        for name in (RUNS, COMMANDS)
    )
    known = {tuple(row[list(RUN_KEYS)]): row for _, row in ledger.iterrows()}
    new = []
    for run in found:
        run |= {"study": study, "command_hash": command["command_hash"]}
        row = {key: "" if value is None else str(value) for key, value in run.items()}
        key = tuple(row.get(name, "") for name in RUN_KEYS)
        if key not in known:
            new.append(row)
            known[key] = pd.Series(row)
        elif any(
            known[key].get(name, "") != value
            for name, value in row.items()
            if name.startswith(("test_", "final_"))
        ):
            raise ValueError(
                f"{folder / RUNS} has other results of {dict(zip(RUN_KEYS, key))}; give"
                " the runs of another machine or version another --study."
            )
    if new:
        ledger = pd.concat([ledger, pd.DataFrame(new)], ignore_index=True)
        ledger.to_csv(folder / RUNS, index=False)
        if command["command_hash"] not in set(commands.command_hash):
            commands = pd.concat([commands, pd.DataFrame([command])])
            commands.to_csv(folder / COMMANDS, index=False)
    return len(new)


def _runs_of(source: pathlib.Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the rows of a comparison or run, and what has command and hardware."""
    folder = source if source.is_dir() else source.parent
    if (path := folder / "comparison.json").exists():
        comparison = read_json(path, _MEND)
        rows = [
            _row(run, comparison["config"] | run.pop("config", {}))
            for run in comparison["runs"]
        ]
        return rows, comparison
    if (path := folder / "summary.json").exists():
        summary = read_json(path, _MEND)
        config = read_json(folder / "config.json", _MEND)
        return [_row({"variant": summary["norm"]} | summary, config)], summary
    raise ValueError(
        f"{source} has neither a comparison.json, as train.compare writes it, nor the"
        " summary.json of a finished run."
    )


def _row(summary: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of a run: its summary, and how it differs from an experiment."""
    experiment, changed = nearest(config)
    scalars = {
        key: value
        for key, value in summary.items()
        if not isinstance(value, dict | list)
        and key != "command"
        and not key.endswith(_LEFT_OUT)
    }
    text = json.dumps(changed, separators=(",", ":"), sort_keys=True)
    diverged = not has_result(summary)
    return scalars | {
        "experiment": experiment,
        "config": text if changed else "",
        "diverged": diverged,
    }


def nearest(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the experiment that a config differs least from, and in which keys."""
    changes = {
        module.name: changed(
            config,
            importlib.import_module(f"{experiments.__name__}.{module.name}")
            .get_config()
            .to_dict(),
        )
        for module in pkgutil.iter_modules(experiments.__path__)
    }
    name = min(changes, key=lambda name: len(changes[name]))
    return name, changes[name]


def changed(config: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys that differ, but for columns of the ledger and reporting."""
    config, base = _plain(config), _plain(base)
    skipped = {*RUN_KEYS, *_REPORTING}
    return {
        key: value
        for key, value in config.items()
        if key not in skipped and value != base.get(key)
    }


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: tuples are lists; options that are JSON in a string are read."""
    config = json.loads(json.dumps(config))
    if isinstance(text := config.get("norm_options"), str):
        config["norm_options"] = json.loads(text)
    return config


def _command(provenance: dict[str, Any]) -> dict[str, str]:
    """Returns the row of ``commands.csv``."""
    hardware, versions = provenance["hardware"], provenance["versions"]
    devices = Counter(hardware["devices"]).items()
    row = {
        "command": provenance["command"],
        "hardware": " + ".join(
            f"{n} x {kind}" if n > 1 else kind for kind, n in devices
        )
        + f", {hardware['machine']}, {hardware['cores']} cores",
        "versions": " ".join(f"{name} {version}" for name, version in versions.items()),
    }
    digest = hashlib.sha256("\n".join(row.values()).encode()).hexdigest()[:7]
    return {"command_hash": digest, **row, "commit": provenance.get("commit", "")}
