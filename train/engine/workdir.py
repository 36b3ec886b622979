"""What a run leaves in its directory: config, metrics, checkpoints, summary."""

from __future__ import annotations

import contextlib
import errno
import json
import logging as python_logging
import os
import pathlib
import platform
import resource
import shlex
import socket
import sys
import zlib
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import filelock
import jax
import orbax.checkpoint as ocp
from absl import logging
from ml_collections import ConfigDict

from configs import base
from train.data.digest import octets
from train.engine import processes
from train.engine.files import (
    damaged,
    is_number,
    naming,
    read_json,
    write_json,
)

CONFIG = "config.json"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
#: keys that a run may go on with another value of, as nothing that it finds hangs on it
_OF_NO_MATTER = ("data_workers", "debug_nans", "max_pixels", "profile_steps")
#: of a summary, that all have
_NUMBERS = (
    "batch_size",
    "micro_batch_size",
    "devices",
    "seed",
    "steps",
    "seconds",
    "test_images",
)
LOCK = "lock"
OWNER = "owner"  # of the lock, in words


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Creates `workdir` and keeps other runs out of it; the lock dies with the process.

    Raises:
        ValueError: another run is at work in it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    owner = workdir / OWNER
    try:
        with filelock.FileLock(workdir / LOCK, blocking=False):
            with naming(owner):
                owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield
    except filelock.Timeout as error:
        at_work = owner.read_text() if owner.exists() else "which has just begun"
        raise ValueError(
            f"another run, {at_work}, is at work in {workdir}; wait for it, stop it, or"
            " choose another --workdir."
        ) from error


def claim(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes the resolved config into `workdir`.

    Raises:
        ValueError: it belongs to a run of another config; the difference is shown.
    """
    check_same(workdir, config)
    if processes.primary():
        write_json(workdir / CONFIG, _as_json(config))


def check_same(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Refuses a `workdir` that holds a run of another config.

    Raises:
        ValueError: it does; the difference is shown.
    """
    if not (workdir / CONFIG).exists():
        return
    ours, theirs = (
        {key: value for key, value in _as_json(c).items() if key not in _OF_NO_MATTER}
        for c in (config, read_config(workdir))
    )
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


def _as_json(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json())  # where a tuple is a list


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """Reads the resolved config of a run.

    A key that there was not when the run was made has its default.

    Raises:
        FileNotFoundError: there is none in `workdir`.
        ValueError: it is damaged.
    """
    path = workdir / CONFIG
    if not path.exists():
        raise FileNotFoundError(
            f"no {CONFIG} in {workdir}; expected the --workdir of a run of"
            " `python -m train`."
        )
    mend = "delete it, and the `python -m train` command of the run writes it anew"
    content = read_json(path, mend)
    try:
        return parse_config(content)
    except (TypeError, ValueError, AttributeError) as error:
        raise damaged(path, mend, f"or of another version: {error}") from error


def parse_config(content: dict[str, Any]) -> ConfigDict:
    """Returns the config that was written as JSON, by this version or one before.

    Raises:
        TypeError, ValueError, AttributeError: it is none.
    """
    config = base.get_config()
    for key, value in _as_of_now(content).items():
        config[key] = tuple(value) if isinstance(value, list) else value
    base.check(config)
    return config


def _as_of_now(content: dict[str, Any]) -> dict[str, Any]:
    """Puts keys of runs that were made before into the form that they have now."""
    if isinstance(content.get("norm_options"), str):
        options = content["norm_options"] = json.loads(content["norm_options"])
        if "hand_on" in options:
            options["propagate"] = options.pop("hand_on")
        # Of other networks width said nothing, and of this one it said what it has.
        if content.get("network") != "cifar_resnet" or content.get("width") == 16:
            content["width"] = 0
        if str(content.get("norm")).startswith("kalman_paper"):
            content["norm"] = content["norm"].replace("paper", "paper_literal", 1)
    if "plugins" not in content and str(content.get("norm")).startswith("control_"):
        content["plugins"] = ["train.studies.controls"]
    return content


def read_summary(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Reads the summary of a finished run; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = workdir / SUMMARY
    if not path.exists():
        return None
    mend = "delete it, and the command of the run writes it anew"
    summary = read_json(path, mend)
    if wrong := [key for key in _NUMBERS if not is_number(summary.get(key))]:
        raise damaged(path, mend, f"no number for {', '.join(wrong)}")
    if not isinstance(summary.get("norm"), str):
        raise damaged(path, mend, "no norm")
    return summary


def open_checkpoints(workdir: pathlib.Path) -> ocp.CheckpointManager:
    """Opens the run's checkpoints; the last two are kept."""
    # What fails is raised, and need not be in the log as well, once by every thread.
    logging.get_absl_logger().addFilter(_no_error_of_orbax)
    python_logging.getLogger("asyncio").setLevel(python_logging.CRITICAL)
    return ocp.CheckpointManager(
        workdir.absolute() / CHECKPOINTS,
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "checksum": ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        ),
    )


def _no_error_of_orbax(record: python_logging.LogRecord) -> bool:
    return record.levelno < python_logging.ERROR or "orbax" not in record.pathname


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Saves `state` after `step` updates, with a checksum.

    Raises:
        OSError: it could not be written, say because the disk is full.
    """
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        checksum=ocp.args.JsonSave(_checksum(state)),
    )
    try:
        checkpoints.save(step, args=args)
    except Exception as error:  # of Orbax and TensorStore, with the system's own words
        why = " ".join(str(error).split())
        full = os.strerror(errno.ENOSPC)
        raise OSError(
            f"the checkpoint of step {step} could not be saved in"
            f" {checkpoints.directory}; those before it are kept."
            f" {full if full in why else why[:300]}"
        ) from error


def _checksum(state: Any) -> int:
    """CRC-32 of all leaves; Orbax itself would read a flipped bit as it is."""
    total = 0
    for leaf in jax.tree.leaves(jax.device_get(state)):
        total = zlib.crc32(octets(leaf), total)
    return total


def restore(checkpoints: ocp.CheckpointManager, state: Any) -> Any:
    """Returns the newest checkpoint that can be read, or `state` if there is none.

    `state` gives the structure, and where the arrays go: a checkpoint made on other
    devices is read all the same. Says so when a checkpoint cannot be read.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    steps = sorted(checkpoints.all_steps(), reverse=True)
    for step in steps:
        try:
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract),
                checksum=ocp.args.JsonRestore(),
            )
            found = checkpoints.restore(step, args=args)
            if found.checksum != _checksum(found.state):
                raise ValueError("its checksum is not that of what it holds.")
        except Exception as error:  # of Orbax, TensorStore, JSON, the file system
            logging.warning(
                "the checkpoint of step %d in %s cannot be read: %s",
                step,
                checkpoints.directory,
                str(error).partition("\n")[0],
            )
        else:
            if step != steps[0]:
                logging.warning("going on from the checkpoint of step %d", step)
            return found.state
    if steps:
        raise _unreadable(checkpoints)
    return state


def _unreadable(checkpoints: ocp.CheckpointManager) -> ValueError:
    return ValueError(
        f"none of the checkpoints in {checkpoints.directory} can be read: damaged,"
        " or of another version; see above. Choose another --workdir."
    )


def forget_after(checkpoints: ocp.CheckpointManager, step: int) -> None:
    """Deletes the checkpoints after `step`, which `restore` could not read: their
    steps will be saved anew."""
    for other in checkpoints.all_steps():
        if other > step:
            checkpoints.delete(other)


def last_checkpoint(workdir: pathlib.Path, state: Any) -> Any:
    """Returns the last checkpoint of a run; `state` gives the structure.

    Raises:
        FileNotFoundError: there is none in `workdir`.
    """
    if not has_checkpoint(workdir):  # Orbax would make the folder
        raise _no_checkpoint(workdir)
    with open_checkpoints(workdir) as checkpoints:
        return restore(checkpoints, state)


def _no_checkpoint(workdir: pathlib.Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"no checkpoint in {workdir / CHECKPOINTS}: the run ended before its first, or"
        " somebody deleted them. The `python -m train` command of the run, given again,"
        " trains from the start."
    )


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Whether a run has saved a checkpoint, be it damaged."""
    folder = workdir / CHECKPOINTS
    return folder.is_dir() and any(step.name.isdigit() for step in folder.iterdir())


def saved_shapes(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns what the last checkpoint of a run holds, as nested dicts and lists; of
    arrays, shape and dtype.

    Raises:
        FileNotFoundError: there is none in `workdir`.
        ValueError: none can be read.
    """
    if not has_checkpoint(workdir):
        raise _no_checkpoint(workdir)
    with open_checkpoints(workdir) as checkpoints:
        for step in sorted(checkpoints.all_steps(), reverse=True):
            if (found := checkpoints.item_metadata(step)["state"]) is not None:
                return dict(found)
    raise _unreadable(checkpoints)


def memory_in_use() -> int:
    """Returns the most memory that a device of this process has used so far, in bytes:
    what the device says, or on the CPU the resident set of the process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(s.get("peak_bytes_in_use", resident) for s in stats)


def provenance() -> dict[str, Any]:
    """Returns the command, with XLA's flags if there are any, hardware and versions, to
    go beside every number."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "kalman_flax")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "source tree"
    module = getattr(sys.modules["__main__"].__spec__, "name", sys.argv[0])
    command = ["python", "-m", module.removesuffix(".__main__"), *sys.argv[1:]]
    xla_flags = os.environ.get("XLA_FLAGS")
    prefix = f"XLA_FLAGS={shlex.quote(xla_flags)} " if xla_flags else ""
    return {
        "command": prefix + shlex.join(command),
        "hardware": {
            "devices": [device.device_kind for device in jax.local_devices()],
            "machine": platform.machine(),
            "cores": os.cpu_count(),
        },
        "versions": versions,
    }
