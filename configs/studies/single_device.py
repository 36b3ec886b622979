"""Study: one device that holds all it trains on, batch_size = micro_batch_size.

    python -m train.compare --config=configs/studies/single_device.py --seeds=2 \\
        --workdir=runs/single --data_dir=DIR

The true small-batch case: as many images as at batch 128, in steps of 2, 8 or 32, the
learning rate scaled with the batch. Updates of 2 images take the longest: a normaliser
trains for 6 to 10 minutes at all three sizes.
"""

from ml_collections import ConfigDict

from configs.experiments import cifar10_tiny
from configs.studies.micro_batch_sizes import INDIVIDUAL, SHARED, ramp

BATCH_SIZES = (2, 8, 32)


def get_config() -> ConfigDict:
    """Returns the study."""
    config = cifar10_tiny.get_config()
    config.variants = tuple(
        (
            norm,
            {
                "norm": norm,
                "batch_size": size,
                "micro_batch_size": size,
                "learning_rate": config.learning_rate * size / config.batch_size,
                # The same horizon in images: 10 steps of 128.
                "stats_momentum": config.stats_momentum ** (size / config.batch_size),
            }
            | ramp(norm, config.epochs * config.train_examples // size),
        )
        for norm in SHARED + INDIVIDUAL
        for size in BATCH_SIZES
    )
    return config
