"""Table 3 of the paper: the speed of a training step of Inception-v2, BN and KN."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from configs import imagenet
from train import workdir as wd
from train.reproductions import paper, picture, result
from train.reproductions.scale import reduced
from train.reproductions.trained import Request
from train.runs import Entry, configure
from train.speed import Stepper, measure, prepare

TITLE = "training speed of Inception-v2, BN and KN, examples/s on random images"
NORMS = {"BN": "batch", "KN": "kalman_paper", "KN, our default": "kalman"}
ROUNDS = 15

_SMOKE = {
    "network": "small_inception",
    "image_size": 32,
    "batch_size": 8,
    "micro_batch_size": 8,
}


def _full(norm: str) -> ConfigDict:
    keys = {"network": "inception_v2", "batch_size": 32, "norm": norm}
    return configure(imagenet.get_config(), Entry(norm, keys), seed=0)


def reproduce(name: str, request: Request) -> None:
    """Times the steps in turn, in one process, on one micro-batch of 32; ``smoke`` a
    small network on few small images."""
    steps, described = {}, {}
    for label, norm in NORMS.items():
        full = _full(norm)
        config = configure(full, Entry(norm, {}), seed=0)
        if request.scale == "smoke":
            config.update(_SMOKE)
        _, step, state, batch = prepare(config, config.image_size, num_classes=1000)
        steps[label] = Stepper(step, state, batch)
        keys = ("norm", "network", "batch_size", "micro_batch_size")
        described[label] = {
            "reduced": reduced(full, config),
            "facts": {key: config[key] for key in keys},
        }
    seconds = measure(steps, ROUNDS)
    column, results = "examples/s", []
    for label, times in seconds.items():
        speeds = described[label]["facts"]["batch_size"] / np.array(times)
        printed = paper.TABLE3.get((label, column), "")
        results.append(
            result.Result(
                label, column, printed, column, speeds.tolist(), **described[label]
            )
        )
    for label in list(NORMS)[1:]:
        row = f"BN / {label}"
        ratios = np.array(seconds[label]) / np.array(seconds["BN"])
        printed = paper.TABLE3.get((row, column), "")
        results.append(
            result.Result(
                row, column, printed, "ratio", ratios.tolist(), **described[label]
            )
        )
    print(result.table(results, runs="timings"))
    devices = wd.provenance()["hardware"]["devices"]
    print(f"The paper: four Titan X. Ours: one of {devices}, by the clock.")
    if request.workdir is not None:
        result.write(request.workdir, name, results, scale=request.scale)
        picture.plot(request.workdir / f"{name}.png", results, {}, None)
        print(f"written: {request.workdir}/{name}.csv, .json, .png")
