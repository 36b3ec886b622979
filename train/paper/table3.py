"""Table 3 of the paper: the speed of a training step of Inception-v2, BN and KN."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from configs.experiments import imagenet
from train.analysis.speed import Stepper, measure, prepare
from train.engine import workdir as wd
from train.paper import picture, printed, result
from train.paper.scale import RESNET8
from train.paper.trained import Request, describe
from train.studies.runs import Entry, configure

TITLE = "training speed of Inception-v2, BN and KN, examples/s on random images"
NORMS = {"BN": "batch", "KN": "kalman_paper", "KN, our default": "kalman"}
COLUMN = "examples/s"
ROUNDS = 15

_SMOKE = RESNET8 | {"image_size": 32, "batch_size": 8, "micro_batch_size": 8}


def _config(norm: str) -> ConfigDict:
    keys = {"network": "inception_v2", "batch_size": 32, "norm": norm}
    return configure(imagenet.get_config(), Entry(norm, keys), seed=0)


def _stepper(config: ConfigDict) -> Stepper:
    _, step, state, batch = prepare(config, config.image_size, num_classes=1000)
    return Stepper(step, state, batch)


def reproduce(name: str, request: Request) -> None:
    """Times the steps in turn, in one process, on one micro-batch of 32, at scale
    ``short`` as well; ``smoke`` times a small network on few small images."""
    full = {label: _config(norm) for label, norm in NORMS.items()}
    configs = {label: _config(norm) for label, norm in NORMS.items()}
    if request.scale == "smoke":
        for config in configs.values():
            config.update(_SMOKE)
    steps = {label: _stepper(config) for label, config in configs.items()}
    seconds = {k: np.array(times) for k, times in measure(steps, ROUNDS).items()}

    def found(row: str, label: str, unit: str, values: np.ndarray) -> result.Result:
        paper = printed.TABLE3.get((row, COLUMN), "")
        described = describe(full[label], configs[label])
        described["facts"]["dataset"] = "random images"
        return result.Result(row, COLUMN, paper, unit, values.tolist(), **described)

    results = [
        found(label, label, COLUMN, configs[label].batch_size / times)
        for label, times in seconds.items()
    ]
    results += [
        found(f"BN / {label}", label, "ratio", times / seconds["BN"])
        for label, times in seconds.items()
        if label != "BN"
    ]
    print(result.table(results, runs="timings"))
    device = wd.provenance()["hardware"]["devices"][0]
    print(f"The paper: four Titan X. Ours, by the clock: one {device}.")
    if request.workdir is not None:
        result.write(request.workdir, name, results, scale=request.scale)
        picture.plot(request.workdir / f"{name}.png", results, {}, None)
        print(f"written: {request.workdir}/{name}.csv, .json, .png")
