"""Parameters and statistics of another run to start from: ``config.init_from``."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import pathlib
import sys
from collections.abc import Collection, Iterable
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from kalman_flax import merge_running, seed_calibration
from kalman_flax.filter import Correction
from train.engine import processes
from train.engine import workdir as wd
from train.engine.checkpoint import COLLECTIONS, Checkpoint, Path, existing, read
from train.engine.experiment import Experiment
from train.engine.mesh import DEVICES, over_devices, same
from train.engine.same_layers import training_only
from train.engine.step import Draws, TrainState, draw, replicas_of

#: what `KalmanNorm.calibrate` keeps
CORRECTION = Correction._fields
#: counts of updates, which a run begins anew
_COUNTS = frozenset({("batch_stats", "step"), ("batch_stats", "steps")})
#: keys of a config that say which network it is
_OF_NETWORK = ("network", "width", "blocks_per_stage", "scan_blocks")
_SHOWN = 5


def loaded(config: Any, experiment: Experiment, workdir: pathlib.Path) -> Experiment:
    """Returns the experiment with the state that ``config.init_from`` gives it.

    It stays as it is where nothing is to be loaded: there is no such key, or the run in
    `workdir` has checkpoints of its own, from which it goes on. Says which parameters
    are new.

    Raises:
        FileNotFoundError: there is nothing at ``config.init_from``.
        ValueError: it is of another network, or of a normaliser that computes something
            else; the message says in what they differ.
    """
    if not config.init_from or wd.has_checkpoint(workdir):
        return experiment
    checkpoint = read(config.init_from, experiment.mesh)
    state = experiment.state
    ours: dict[Path, Any] = traverse_util.flatten_dict(
        {name: getattr(state, name) for name in COLLECTIONS}
    )
    found, news = fit(checkpoint, ours, config)
    if processes.primary():
        for line in (*news, f"{len(found)} arrays come from {checkpoint.name}"):
            print(line, file=sys.stderr, flush=True)
    where = same(experiment.mesh)
    tree = traverse_util.unflatten_dict(
        ours
        | {
            path: jax.device_put(np.asarray(leaf, ours[path].dtype), where)
            for path, leaf in found.items()
        }
    )
    state = state.replace(**{name: tree.get(name, {}) for name in COLLECTIONS})
    if any(path[-1] in CORRECTION for path in ours.keys() - found.keys()):
        state = seed(config, experiment, state, known=found.keys())
    return dataclasses.replace(experiment, state=state)


def seed(
    config: Any, experiment: Experiment, state: TrainState, known: Collection[Path]
) -> TrainState:
    """Returns the loaded state with what `KalmanNorm.calibrate` makes of its running
    statistics: training begins as with frozen batch norm.

    One pass over the first batch; its examples matter alone where the filter observes
    on the way: behind a max-pool, and on a detector's crops. Layers whose statistics
    are not `known`, but new, have nothing to be seeded by.
    """
    task, mesh = experiment.task, experiment.mesh

    def on_device(variables: Any, batch: Any, draws: Draws) -> Any:
        one = draws.keys[:1]  # the rows of a device, as one micro-batch
        _, written = task.loss(task.network, variables, batch, draws.examples, one)
        return merge_running(written["batch_stats"], config.stats_momentum, DEVICES)

    def forward(variables: Any, batch: Any, draws: Draws) -> tuple[None, Any]:
        stats = over_devices(on_device, mesh)(variables, batch, draws)
        return None, {"batch_stats": stats}

    draws = draw(task, experiment.key, 0, replicas_of(config, mesh))
    variables = seed_calibration(
        jax.jit(forward), state.variables, experiment.batch(0), draws
    )
    fresh = traverse_util.flatten_dict(state.batch_stats)
    stats = {
        path: leaf if ("batch_stats", *path[:-1], "mean") in known else fresh[path]
        for path, leaf in traverse_util.flatten_dict(variables["batch_stats"]).items()
    }
    return state.replace(batch_stats=traverse_util.unflatten_dict(stats))


def check(config: Any, workdir: pathlib.Path) -> None:
    """Looks, without reading it, for what the run in `workdir` is to start from.

    Raises:
        FileNotFoundError: it is needed, and not there.
    """
    if config.init_from and not wd.has_checkpoint(workdir):
        existing(config.init_from)


def fit(
    checkpoint: Checkpoint, ours: dict[Path, Any], config: Any
) -> tuple[dict[Path, Any], list[str]]:
    """Chooses what of a checkpoint a run takes over.

    All must be there, in the same shape, but for what ``config.new_layers`` names, for
    counts of updates, and for what only the training of a normaliser needs.

    Args:
        checkpoint: what there is.
        ours: the run's own variables, by path.
        config: of the run.

    Returns:
        What is loaded, by path; and a line for each parameter that is new.

    Raises:
        ValueError: it does not fit.
    """
    theirs = checkpoint.variables
    optional = _COUNTS | training_only(checkpoint, config, ours)
    loaded, news, problems = {}, [], []
    for path, leaf in ours.items():
        found = theirs.get(path)
        if _key(path) in _COUNTS or (found is None and _key(path) in optional):
            continue
        if found is not None and np.shape(found) == np.shape(leaf):
            loaded[path] = found
            continue
        text = (
            f"{_shape(found)} in the checkpoint, {_shape(leaf)} here"
            if found is not None
            else "not in the checkpoint"
        )
        if _is_new(path, config):
            news.append(f"{_name(path)}: {text}: kept as initialised")
        else:
            near = "" if found is not None else _nearest(path, theirs.keys() - ours)
            problems.append(f"{_name(path)}: {text}{near}")
    for path in theirs.keys() - ours.keys():
        if _is_new(path, config):
            news.append(f"{_name(path)}: in the checkpoint, not here: left out")
        elif _key(path) not in optional:
            near = _nearest(path, ours.keys() - theirs)
            problems.append(f"{_name(path)}: in the checkpoint, not here{near}")
    if problems or not loaded:
        raise ValueError(_misfit(checkpoint, config, sorted(problems)))
    return loaded, news


def _key(path: Path) -> tuple[str, str]:
    return path[0], path[-1]


def _name(path: Path) -> str:
    return "/".join(path[1:])


def _shape(leaf: Any) -> str:
    return str(list(np.shape(leaf)))


def _is_new(path: Path, config: Any) -> bool:
    return any(fnmatch.fnmatchcase(_name(path), p) for p in config.new_layers)


def _nearest(path: Path, others: Iterable[Path]) -> str:
    names = [_name(other) for other in others if other[0] == path[0]]
    close = difflib.get_close_matches(_name(path), names, 1)
    return f"; the nearest is {close[0]}" if close else ""


def _misfit(checkpoint: Checkpoint, config: Any, problems: list[str]) -> str:
    theirs = checkpoint.config
    differences = [
        f"{key} is {theirs[key]!r} there, {config[key]!r} here"
        for key in _OF_NETWORK
        if theirs is not None and theirs[key] != config[key]
    ]
    if more := problems[_SHOWN:]:
        problems = [*problems[:_SHOWN], f"and {len(more)} more"]
    lines = "".join(f"\n  {line}" for line in (*differences, *problems))
    return (
        f"init_from, {checkpoint.name}, is of another network than {config.network!r}"
        f" with norm {config.norm!r}:{lines}\nTake the network that it was trained as,"
        " or name in new_layers what is meant to be new."
    )
