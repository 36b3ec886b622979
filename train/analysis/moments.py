"""Measures estimates of the statistics against those of all training images."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from kalman_flax import compiler_options
from kalman_flax.registry import KERNEL_MAPS
from train.data.batches import draw_crops
from train.engine import trained_on
from train.engine import workdir as wd
from train.engine.classification import Classification
from train.engine.experiment import Experiment, build
from train.engine.mesh import over_devices
from train.engine.task import of_kind

ESTIMATES = ("observed", "predicted", "filtered", "moving")
#: what is wrong with an estimate, root mean squares over channels and micro-batches
ERRORS = {
    "mean_error": "(mean - mean*) / std*",
    "variance_error": "log(var / var*)",
    "relative_error": "log(var / var*) less its mean over the layer",
}
EPSILON = 1e-5  # added to variances, as the normalisers do
BATCH = 512  # images at a time, at most

Layers = dict[str, dict[str, np.ndarray]]  # layer -> "mean", "var" -> [..., C]


def watched(config: ConfigDict) -> ConfigDict:
    """Returns `config` with a normaliser that reports its states: `KalmanNorm`, which
    with gain 1 is batch norm.

    Raises:
        ValueError: the run's normaliser has no statistics of the micro-batch.
    """
    if config.norm in ("batch", *(f"batch{end}" for end in KERNEL_MAPS)):
        config.norm = config.norm.replace("batch", "kalman")
        config.norm_options = {"gain": 1.0, "learn_gain": None}
    elif not config.norm.startswith(("kalman", "control")):
        raise ValueError(
            f"{config.norm!r} does not filter statistics of the micro-batch; expected a"
            " run of batch norm or of a Kalman normaliser other than group_kalman."
        )
    return config


def restore(
    workdir: pathlib.Path, data_dir: str | None
) -> tuple[Experiment, ConfigDict]:
    """Returns a run, watched, at its last checkpoint, and its config.

    Raises:
        FileNotFoundError: no config or no checkpoint in `workdir`, or no data.
        ValueError: see `watched`.
    """
    config = watched(wd.read_config(workdir))
    experiment = build(config, data_dir)
    of_kind(experiment.task, Classification)
    state = trained_on.last_state(workdir, experiment)
    return dataclasses.replace(experiment, state=state), config


def collect(
    experiment: Experiment, config: ConfigDict, size: int, images: int, kept: int
) -> tuple[Layers, dict[str, Layers]]:
    """Runs the training images in micro-batches of `size`.

    Returns:
        The moments of every layer's input over all images, ``[C]``; and by kind the
        estimates of the first `kept` micro-batches, ``[kept, C]``, or ``[1, C]`` for
        the moving averages.
    """
    truth: dict[str, _Pooled] = {}
    estimates: dict[str, list[Layers]] = {}
    for seen in _states(experiment, config, size, images):
        for layer, stats in seen["observed"].items():
            truth.setdefault(layer, _Pooled()).add(stats["mean"], stats["var"])
        for kind, layers in seen.items():
            chosen = estimates.setdefault(kind, [])
            if sum(len(next(iter(b.values()))["mean"]) for b in chosen) < kept:
                chosen.append(layers)
    joined = {
        kind: {
            layer: {
                stat: np.concatenate([batch[layer][stat] for batch in batches])[:kept]
                for stat in ("mean", "var")
            }
            for layer in batches[0]
        }
        for kind, batches in estimates.items()
    }
    running: Any = traverse_util.flatten_dict(
        jax.device_get(experiment.state.batch_stats), sep="/"
    )
    joined["moving"] = {
        layer: {stat: running[f"{layer}/{stat}"][None] for stat in ("mean", "var")}
        for layer in truth
    }
    return {layer: pooled.moments() for layer, pooled in truth.items()}, joined


def _states(
    experiment: Experiment, config: ConfigDict, size: int, images: int
) -> Iterator[dict[str, Layers]]:
    """Yields what the normalisers report of one batch after the other, ``[R, C]``."""
    task, mesh = of_kind(experiment.task, Classification), experiment.mesh
    count = task.train.examples
    count = min(images or count, count)
    step = min(BATCH, count) // size * size
    if not step:
        raise ValueError(f"{count} images hold no micro-batch of {size}.")

    def on_device(given: tuple[jax.Array, jax.Array]) -> Any:
        images, first = given
        key = jax.random.fold_in(jax.random.key(config.seed), first)
        crops = draw_crops(key, step, config.crop_padding, config.flip)
        _, written = task.replicas(
            task.network,
            experiment.state.variables,
            images,
            crops,
            jax.random.split(key, step // size),
            mutable=("batch_stats", "intermediates"),
        )
        return written["intermediates"]

    options = compiler_options()
    run = jax.jit(over_devices(on_device, mesh), compiler_options=options)
    # Whole batches only, and in random order: the classes must not come in turn.
    order = np.random.default_rng(config.seed).permutation(count)
    for start in range(0, count - step + 1, step):
        index = order[start : start + step]
        found = run((task.train.read(index).images, index[0]))
        flat: dict[Any, Any] = traverse_util.flatten_dict(jax.device_get(found))
        seen: dict[str, Layers] = {}
        for (*path, kind), state in flat.items():
            stats = {
                stat: np.asarray(getattr(state, stat), np.float64)
                for stat in ("mean", "var")
            }
            seen.setdefault(kind, {})["/".join(path)] = stats
        yield seen


class _Pooled:
    """Moments over sets of equal size, each with its own: law of total variance."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.var: Any = 0.0

    def add(self, means: np.ndarray, variances: np.ndarray) -> None:
        """Adds R sets, ``[R, C]`` each."""
        share = len(means) / (self.count + len(means))
        shift = means.mean(0) - self.mean
        var = variances.mean(0) + means.var(0)
        self.var += share * (var - self.var) + share * (1 - share) * shift**2
        self.mean += share * shift
        self.count += len(means)

    def moments(self) -> dict[str, np.ndarray]:
        """Returns the mean and variance, ``[C]``."""
        return {"mean": self.mean, "var": self.var}


def errors(
    estimate: dict[str, np.ndarray], truth: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns `ERRORS` of every channel, ``[..., C]``, the estimate's shape."""
    var = truth["var"] + EPSILON
    log_ratio = np.log((estimate["var"] + EPSILON) / var)
    return {
        "mean_error": (estimate["mean"] - truth["mean"]) / np.sqrt(var),
        "variance_error": log_ratio,
        "relative_error": log_ratio - log_ratio.mean(-1, keepdims=True),
    }


def rows_of(
    truth: Layers, estimates: dict[str, Layers], size: int
) -> list[dict[str, Any]]:
    """Returns the RMS errors, a row for each layer and kind of estimate."""
    return [
        {
            "micro_batch_size": size,
            "layer": layer,
            "depth": depth,
            "estimate": kind,
            **{
                name: float(np.sqrt(np.mean(np.square(error))))
                for name, error in errors(estimates[kind][layer], truth[layer]).items()
            },
            "channels": len(truth[layer]["mean"]),
        }
        for depth, layer in enumerate(in_order(truth))
        for kind in ESTIMATES
        if layer in estimates.get(kind, {})
    ]


def in_order(layers: Any) -> list[str]:
    """The layers from bottom to top: the stem's first, the final one last."""

    def place(name: str) -> tuple[Any, ...]:
        parts = re.split(r"(\d+)", name)  # block2 comes before block10
        numbers = [int(part) if part.isdigit() else part for part in parts]
        return not name.startswith("stem"), name == "final_norm", numbers

    return sorted(layers, key=place)


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns RMS errors over all layers, every channel counting alike."""
    result = []
    for size in dict.fromkeys(row["micro_batch_size"] for row in rows):
        for kind in ESTIMATES:
            chosen = [
                row
                for row in rows
                if (row["micro_batch_size"], row["estimate"]) == (size, kind)
            ]
            weights = [row["channels"] for row in chosen]
            line = {"micro_batch_size": size, "estimate": kind}
            for name in ERRORS:
                squares = [row[name] ** 2 for row in chosen]
                line[name] = float(np.sqrt(np.average(squares, weights=weights)))
            result.append(line)
    return result


def table(summary: list[dict[str, Any]]) -> str:
    """Returns a Markdown table, a row for each micro-batch size."""
    lines = [
        "| micro-batch | "
        + " | ".join(f"{kind}, mean / var / relative" for kind in ESTIMATES)
        + " |",
        "|---" * (1 + len(ESTIMATES)) + "|",
    ]
    for size in dict.fromkeys(line["micro_batch_size"] for line in summary):
        cells = [
            " / ".join(f"{line[name]:.3f}" for name in ERRORS)
            for line in summary
            if line["micro_batch_size"] == size
        ]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def variance_gaps(maps: dict[str, Layers], kind: str) -> dict[str, np.ndarray]:
    """Returns |var - moving| / moving of an estimate, ``[kept, C]`` by layer, from the
    stem up: the paper's Fig. 5, but relative."""
    moving = {layer: stats["var"] for layer, stats in maps["moving"].items()}
    return {
        layer: np.abs(maps[kind][layer]["var"] - moving[layer]) / moving[layer]
        for layer in in_order(moving)
    }


def learned_gains(params: Any) -> dict[str, np.ndarray]:
    """Returns the gains q that were learned, by layer: ``[1]`` or ``[C]``."""
    flat: dict[str, Any] = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    logits = {
        path.removesuffix("/gain"): leaf
        for path, leaf in flat.items()
        if path.endswith("/gain")
    }
    return {
        layer: np.atleast_1d(jax.nn.sigmoid(logits[layer]))
        for layer in in_order(logits)
    }
