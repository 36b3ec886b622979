"""Study: does a filter that corrects its predictions train without help, and with plain
kernels?

    python -m train.compare --config=configs/studies/calibration.py --seeds=2 \\
        --workdir=runs/calibration --data_dir=DIR

By the tiny protocol, at micro-batch 1 and 2, at the usual rate and at four times that,
with gradients clipped and not. "kalman_wc" is the default of today; "calibrated" has
``calibrate="var"`` and begins with 20 passes that set its statistics. Controls: moving
averages in the place of the prediction, with the same start; gain 0; a gain of max(q,
1 / (1 + t)) in the place of the start; and updates of one true micro-batch, whose
statistics are averaged over ten times as many.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.experiments import cifar10_tiny

SIZES = (1, 2)
RATES = (0.1, 0.4)
CLIPPED = {"": {}, " clipped": {"clip_norm": 1.0}}
START = {"calibrate_batches": 20}


def calibrated(norm: str, what: str = "var", **options: Any) -> dict[str, Any]:
    """Returns the config keys of a normaliser that corrects its predictions."""
    return {"norm": norm, "norm_options": {"calibrate": what} | options} | START


NORMS: dict[str, dict[str, Any]] = {
    "kalman_wc": {"norm": "kalman_wc"},
    "kalman": {"norm": "kalman"},
    "calibrated_wc": calibrated("kalman_wc"),
    "calibrated": calibrated("kalman"),
    "calibrated mean and variance": calibrated("kalman", "both"),
}
CONTROLS: dict[str, dict[str, Any]] = {
    "control: moving averages": {"norm": "control_moving_wc"} | START,
    "control: gain 0": calibrated("kalman_wc", gain=0.0),
    "control: falling gain, no start": calibrated("control_opening_wc")
    | {"calibrate_batches": 0},
}
#: at one size: the reference, and one that has none
OTHERS: dict[str, dict[str, Any]] = {
    "batch@128": {"norm": "batch", "micro_batch_size": 128},
    "group_ws": {"norm": "group_ws", "micro_batch_size": 2},
}


def get_config() -> ConfigDict:
    """Returns the study."""
    config = cifar10_tiny.get_config()
    config.plugins = ("train.studies.controls",)
    config.eval_epochs = config.epochs
    entries = OTHERS | {
        f"{name}@{size}": keys | {"micro_batch_size": size}
        for name, keys in (NORMS | CONTROLS).items()
        for size in SIZES
    }
    config.variants = tuple(
        (f"{name} rate {rate}{clipped}", keys | {"learning_rate": rate} | clip)
        for rate in RATES
        for clipped, clip in CLIPPED.items()
        for name, keys in entries.items()
    ) + tuple(
        (f"{name}@{size} alone", keys | _alone(config, size))
        for name, keys in NORMS.items()
        for size in SIZES
    )
    return config


def _alone(config: ConfigDict, size: int) -> dict[str, Any]:
    """One micro-batch an update, and as many images: the rate scaled with the batch."""
    return {
        "batch_size": size,
        "micro_batch_size": size,
        "learning_rate": config.learning_rate * size / config.batch_size,
        "stats_momentum": 0.99,
        "calibrate_batches": 200,
    }
