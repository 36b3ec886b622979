"""Study: each normaliser at the learning rate that suits it, by the short protocol.

    python -m train.compare --config=configs/learning_rates.py --seeds=3 \\
        --workdir=runs/rates --data_dir=DIR

A comparison at one rate for all favours those whose rate it is. With
``--config.warmup_epochs=1`` the rate rises to it over the first epoch.
"""

from ml_collections import ConfigDict

from configs import cifar10_short

#: normaliser and micro-batch size; group norm takes each image by itself
ENTRIES = (("batch", 128), ("group_ws", 2), ("kalman_wc", 2), ("kalman_wc", 1))
RATES = (0.05, 0.1, 0.2, 0.4)


def get_config() -> ConfigDict:
    """Returns the study."""
    config = cifar10_short.get_config()
    config.eval_epochs = config.epochs
    config.variants = tuple(
        (
            f"{norm}@{size} rate {rate}",
            {"norm": norm, "micro_batch_size": size, "learning_rate": rate},
        )
        for rate in RATES
        for norm, size in ENTRIES
    )
    return config
