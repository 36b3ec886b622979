"""What a run leaves in its directory: config, metrics, checkpoints, summary."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import sys
from importlib import metadata
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from configs import base

CONFIG = "config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON so that a crash leaves the old file or the new one, never half."""
    _replace(path, json.dumps(content, indent=2) + "\n")


def _replace(path: pathlib.Path, text: str) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(text)
    os.replace(draft, path)


def claim(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Creates `workdir` and writes the resolved config into it.

    Raises:
        ValueError: it belongs to a run of another config; the difference is shown.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / CONFIG
    # Through JSON and back, since there a tuple is a list.
    ours = json.loads(config.to_json())
    theirs = json.loads(read_config(workdir).to_json()) if path.exists() else ours
    if ours != theirs:
        differences = [
            f"  {key}: {theirs.get(key, 'absent')!r} there, {ours.get(key, 'absent')!r}"
            " asked for"
            for key in sorted(ours | theirs)
            if ours.get(key, "absent") != theirs.get(key, "absent")
        ]
        raise ValueError(
            f"{workdir} holds a run of another config:\n"
            + "\n".join(differences)
            + "\nChoose another --workdir, or delete this one."
        )
    write_json(path, ours)


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """Reads the resolved config of a run.

    A key that there was not when the run was made has its default.

    Raises:
        FileNotFoundError: there is none in `workdir`.
    """
    path = workdir / CONFIG
    if not path.exists():
        raise FileNotFoundError(
            f"no {CONFIG} in {workdir}; expected the --workdir of a run of"
            " `python -m train`."
        )
    config = base.get_config()
    for key, value in json.loads(path.read_text()).items():
        config[key] = tuple(value) if isinstance(value, list) else value
    return config


def open_checkpoints(workdir: pathlib.Path) -> ocp.CheckpointManager:
    """Opens the run's checkpoints; the last two are kept."""
    return ocp.CheckpointManager(
        workdir.absolute() / "checkpoints",
        options=ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        ),
    )


def restore(checkpoints: ocp.CheckpointManager, state: Any) -> Any:
    """Returns the last checkpoint, or `state`, which gives the structure, if none."""
    if checkpoints.latest_step() is None:
        return state
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    return checkpoints.restore(
        checkpoints.latest_step(), args=ocp.args.StandardRestore(abstract)
    )


def last_checkpoint(workdir: pathlib.Path, state: Any) -> Any:
    """Returns the last checkpoint of a run; `state` gives the structure.

    Raises:
        FileNotFoundError: there is none in `workdir`.
    """
    with open_checkpoints(workdir) as checkpoints:
        if checkpoints.latest_step() is None:
            raise FileNotFoundError(f"no checkpoint in {workdir}; train for longer.")
        return restore(checkpoints, state)


class MetricsLog:
    """Scalars by step, as JSON lines for our own plots and as TensorBoard events.

    Opened at step s, it forgets what an interrupted run wrote after its checkpoint.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        """Opens the log of a run that goes on from `step`."""
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        path = workdir / METRICS
        _replace(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._lines = path.open("a", buffering=1)
        self._events = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1, flush_secs=10
        )
        #: seconds that training took up to `step`, over all interruptions
        self.seconds = kept[-1]["seconds"] if kept else 0.0

    def write(self, step: int, seconds: float, **scalars: float) -> None:
        """Writes one line: after `step` updates and so many seconds."""
        line = {"step": step, "seconds": round(seconds, 3)} | scalars
        self._lines.write(json.dumps(line) + "\n")
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both files."""
        self._lines.close()
        self._events.close()


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Reads what `MetricsLog` wrote; a last line cut off by a crash does not count."""
    path = workdir / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def provenance() -> dict[str, Any]:
    """Returns the command, hardware and versions, to go beside every number."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "kalman_flax")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "source tree"
    module = getattr(sys.modules["__main__"].__spec__, "name", sys.argv[0])
    command = ["python", "-m", module.removesuffix(".__main__"), *sys.argv[1:]]
    return {
        "command": " ".join(command),
        "hardware": {
            "devices": [device.device_kind for device in jax.local_devices()],
            "machine": platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": versions,
    }
