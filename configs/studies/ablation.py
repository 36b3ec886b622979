"""Study: what makes the filter work? One part changed at a time, at micro-batch 2.

    python -m train.compare --config=configs/studies/ablation.py --seeds=2 \\
        --workdir=runs/ablation --data_dir=DIR

The reference is kalman_wc, whose gain is 0.02. Two controls decide whether the
*prediction* matters: one shuffled over the channels, and moving averages in its place.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.experiments import cifar10_tiny


def options(**attributes: Any) -> dict[str, Any]:
    """Returns the config keys that set attributes of the normaliser."""
    return {"norm_options": attributes}


def get_config() -> ConfigDict:
    """Returns the study."""
    config = cifar10_tiny.get_config()
    config.plugins = ("train.studies.controls",)
    config.norm = "kalman_wc"
    config.variants = (
        ("reference", {}),
        *((f"gain {q}", options(gain=q, learn_gain=None)) for q in GAINS),
        ("gain learned from 0.1", options(gain=0.1, learn_gain="scalar")),
        ("by channel", options(gain=0.1, learn_gain="channel")),
        ("rule of Eq. 7", options(rule="paper")),
        ("noise added", options(noise="additive")),
        ("noise multiplied", options(noise="multiplicative")),
        ("raw state", options(propagate="raw")),
        ("raw state and guard", options(propagate="raw", outlier_ratio=100.0)),
        ("no border", {"norm": "control_no_border_wc"}),
        ("Monte Carlo", {"norm": "kalman_mc_wc"}),
        ("no gradient through prediction", {"norm": "control_constant_wc"}),
        ("no state in the stream", {"norm": "control_no_stream_wc"}),
        ("kernels as they are", {"norm": "kalman"}),
        ("kernels standardised", {"norm": "kalman_ws"}),
        ("control: shuffled prediction", {"norm": "control_shuffled_wc"}),
        ("control: moving averages", {"norm": "control_moving_wc"}),
    )
    return config


GAINS = (0.0, 0.1, 0.5, 0.9, 1.0)
