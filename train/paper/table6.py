"""Table 6 of the paper: Mask R-CNN, fine-tuned with each normaliser.

The paper does not say which layers became KN, what is frozen, at what gain, or how the
network of group norm was pre-trained; what it leaves out is here as in
configs/experiments/coco_c4.py. BN* is frozen batch norm; of batch norm the paper has no
row. KN is `kalman_paper`; "ours" is `kalman`, seeded from the checkpoint's statistics.

At full size it starts from what `Request.init_from` names. Cut down, it pre-trains
classifiers of single digits first, by configs/experiments/digits_colour.py, and
fine-tunes them into configs/experiments/scenes_fine_tuning.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from configs.experiments import coco_c4, digits_colour, scenes_fine_tuning
from train.paper import picture, printed, result
from train.paper.measure import Measure
from train.paper.trained import OURS, Request, result_of, train_all
from train.studies.runs import Entry, Job, configure, run_all

TITLE = "COCO box and mask AP of fine-tuned Mask R-CNN, BN*, GN and KN"

#: what the literature says, to be read beside the table
NOTE = (
    "KN's 37.8 / 33.1 is also what tensorpack reaches with BN*, by 512 regions in place"
    " of 256 and 360,000 updates in place of 280,000: 37.8 / 33.2. What the paper's KN"
    " gains is the size of what a longer schedule gains."
)
SMALL = (
    "Ours is of another data set and network here: compare its rows with each other,"
    " and none with the paper's numbers."
)

ROWS: dict[str, dict[str, Any]] = {
    "BN*": {"norm": "frozen_batch"},
    "BN": {"norm": "batch"},
    "GN": {"norm": "group", "norm_options": {"num_groups": 32}},
    "KN": {"norm": "kalman_paper"},
    f"KN{OURS}": {"norm": "kalman", "norm_options": {"calibrate": "both"}},
}


def _ap(name: str) -> Measure:
    return Measure(lambda run: 100 * run.summary[f"test_{name}"], "AP (%)")


#: the paper does not say by which statistics it tests
COLUMNS = {
    "box AP": _ap("moving_box_AP"),
    "mask AP": _ap("moving_mask_AP"),
    "box AP50": _ap("moving_box_AP50"),
    "box AP, option B": _ap("batch_box_AP"),
    "mask AP, option B": _ap("batch_mask_AP"),
}

#: smoke: two updates, of few regions
_SMOKE = {
    "train_examples": 4,
    "test_examples": 2,
    "batch_size": 2,
    "total_steps": 2,
    "warmup_steps": 0,
    "eval_batch_size": 2,
    "log_steps": 1,
    "network_options": {
        "rpn_channels": 8,
        "mask_channels": 8,
        "candidates_training": 32,
        "candidates": 32,
        "proposals_training": 16,
        "proposals": 16,
        "detections": 4,
    },
}
_SMOKE_PRETRAINING = {
    "train_examples": 64,
    "test_examples": 32,
    "epochs": 1,
    "warmup_epochs": 0,
}


def reproduce(name: str, request: Request) -> None:
    """Pre-trains, or looks for what is to be fine-tuned, and then as other tables do.

    Raises:
        FileNotFoundError: at full size, without COCO or a pre-trained network.
    """
    full = {
        row: configure(coco_c4.get_config(), Entry(row, keys), seed=0)
        for row, keys in ROWS.items()
    }
    norms = {start_of(each) for each in full.values() if request.wants(each)}
    find = _given if request.scale == "full" else _pretrained
    starts = find(request, sorted(norms))
    for each in full.values():
        each.init_from = starts.get(start_of(each), "")
    series = train_all(request, full, scaled)
    results = [
        result_of(
            row,
            column,
            printed.TABLE6.get((row.removesuffix(OURS), column), ""),
            measure,
            series.get(row),
        )
        for row in ROWS
        for column, measure in COLUMNS.items()
    ]
    print(result.table(results))
    print(NOTE if request.scale == "full" else f"{NOTE}\n{SMALL}")
    result.write(request.folder, name, results, scale=request.scale)
    picture.plot(request.folder / f"{name}.png", results, {}, None)
    print(f"written: {request.folder}/{name}.csv, .json, .png")


def start_of(config: ConfigDict) -> str:
    """Returns the normaliser of the network that a run fine-tunes."""
    return "group" if config.norm == "group" else "batch"


def scaled(full: ConfigDict, scale: str, data_dir: str | None) -> ConfigDict:
    """Returns the run of the paper, or its small copy: see
    `train.paper.scale.scaled`."""
    if scale == "full":
        return copy.deepcopy(full)
    config = scenes_fine_tuning.get_config()
    config.norm, config.init_from = full.norm, full.init_from
    if full.norm != "group":  # 32 groups are more than there are channels
        config.norm_options = full.norm_options
    if scale == "smoke":
        config.update(_SMOKE)
    return config


def _given(request: Request, norms: Iterable[str]) -> dict[str, str]:
    """Returns what the user has of what a run at full size needs."""
    starts: dict[str, str] = dict(zip(("batch", "group"), request.init_from))
    missing = [
        f"a ResNet-50 pre-trained with {norm} norm (--init_from=BATCH,GROUP)"
        for norm in norms
        if norm not in starts
    ]
    if not request.data_dir:
        missing.insert(0, "COCO 2017 (--data_dir=DIR, 19 GB, see docs/detection.md)")
    if missing:
        raise FileNotFoundError(
            f"table6 at full size lacks {' and '.join(missing)}. A row of it is 280,000"
            " updates of 8 images, an estimated 3 to 5 days on one H100; --norms leaves"
            " rows out, and --scale=short is a small copy that needs nothing."
        )
    return starts


def _pretrained(request: Request, norms: Iterable[str]) -> dict[str, str]:
    """Trains what is missing of the classifiers, and returns where they are."""
    jobs = {}
    for norm in norms:
        name = f"pretrained-{norm}"
        config = configure(
            digits_colour.get_config(), Entry(name, {"norm": norm}), seed=0
        )
        if request.scale == "smoke":
            config.update(_SMOKE_PRETRAINING)
        jobs[norm] = Job(config, name, request.folder / name)
    run_all(list(jobs.values()), request.data_dir)
    return {norm: str(job.run_dir) for norm, job in jobs.items()}
