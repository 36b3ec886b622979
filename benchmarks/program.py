"""The programs that are measured: the normalisers in the trainer's step."""

from __future__ import annotations

from typing import Any

import jax
from ml_collections import ConfigDict

from configs.experiments import cifar10_short, coco_c4
from kalman_flax import DETECTORS
from train.engine import classification, detector
from train.engine.detection import Detection
from train.engine.settings import check
from train.engine.step import TrainState

BASELINE = "flax"
#: the help of the flag
SIZE = "Height and width of the images; a detector's are 5/3 as wide as high."
VARIANTS = {
    # `nn.BatchNorm` as Flax has it, and with two centred passes for the variance.
    "flax": {"norm": "batch", "norm_options": {"use_fast_variance": True}},
    "batch": {"norm": "batch"},
    "ours": {"norm": "kalman", "norm_options": {"gain": 1.0}},
    "group": {"norm": "group"},
    "batch_renorm": {"norm": "batch_renorm"},
    "kalman": {"norm": "kalman"},
    "kalman_wc": {"norm": "kalman_wc"},
    "kalman_mc": {"norm": "kalman_mc"},
    "frozen_batch": {"norm": "frozen_batch"},
}
#: the blocks of a stage as one `nn.scan`
VARIANTS["kalman_scan"] = {"norm": "kalman", "scan_blocks": True}
#: two of them with norms and activations computed again in the backward pass
VARIANTS |= {
    f"{name}_remat": VARIANTS[name] | {"remat": True} for name in (BASELINE, "kalman")
}


def configure(variant: str, **keys: Any) -> ConfigDict:
    """Returns the config of one program, of a classifier or a detector."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known are {list(VARIANTS)}.")
    base = coco_c4 if keys.get("network") in DETECTORS else cifar10_short
    config = base.get_config()
    config.init_from = "a checkpoint"  # for the check: nothing here reads one
    config.update(keys)
    config.update(VARIANTS[variant])
    check(config)
    return config


def compile_inference(task: Any, state: TrainState, batch: Any) -> Any:
    """Compiles inference by moving statistics (option A), ``(state, batch) ->
    outputs``; of the batch it takes the images."""

    @jax.jit
    def serve(state: TrainState, batch: Any) -> Any:
        if isinstance(task, Detection):
            inputs = detector.prepare(batch.canvases, task.standardize)
            return detector.infer(task.network, state.variables, inputs)
        images = task.standardize(batch.images)
        return classification.infer(task.network, state.variables, images)

    return serve.lower(state, batch).compile()
