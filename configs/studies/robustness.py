"""Study: how far the figures at micro-batch 2 bear another learning rate, micro-batches
of a single class, bfloat16, and a deeper network.

    python -m train.compare --config=configs/studies/robustness.py --seeds=2 \\
        --workdir=runs/robustness --data_dir=DIR
"""

from ml_collections import ConfigDict

from configs.experiments import cifar10_tiny

NORMS = ("batch", "group_ws", "kalman", "kalman_wc")
CHANGES = {
    "reference": {},
    "rate 0.03": {"learning_rate": 0.03},
    "rate 0.3": {"learning_rate": 0.3},
    "one class": {"sort_batches": True},
    "bfloat16": {"dtype": "bfloat16"},
    "20 layers": {"blocks_per_stage": 3},
}


def get_config() -> ConfigDict:
    """Returns the study."""
    config = cifar10_tiny.get_config()
    config.variants = tuple(
        (f"{norm} {change}", {"norm": norm} | keys)
        for change, keys in CHANGES.items()
        for norm in NORMS
    )
    return config
