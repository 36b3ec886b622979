"""Study: the rivals that came after the paper, each at several learning rates.

    python -m train.compare --config=configs/studies/rivals.py --workdir=runs/rivals \\
        --data_dir=DIR

By the tiny protocol, micro-batches of 2. "normalizer_free" is NF-ResNet with scaled
weight standardisation, with adaptive gradient clipping and without. Report each at its
own best rate.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.experiments import cifar10_tiny

RATES = (0.05, 0.1, 0.2, 0.4)
NORMALIZER_FREE = {"network": "nf_resnet", "norm": "normalizer_free"}
ENTRIES: dict[str, dict[str, Any]] = {
    "normalizer_free": NORMALIZER_FREE,
    "normalizer_free AGC": NORMALIZER_FREE | {"clip_adaptive": 0.1},
    "proxy_group": {"norm": "proxy_group"},
    "batch_channel_ws": {"norm": "batch_channel_ws"},
    "group_ws": {"norm": "group_ws"},
    "kalman_wc": {"norm": "kalman_wc"},
}


def get_config() -> ConfigDict:
    """Returns the study."""
    config = cifar10_tiny.get_config()
    config.micro_batch_size = 2
    config.eval_epochs = config.epochs
    config.variants = tuple(
        (f"{name} rate {rate}", keys | {"learning_rate": rate})
        for name, keys in ENTRIES.items()
        for rate in RATES
    )
    return config
