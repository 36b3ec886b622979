"""ResNet-20 on CIFAR-10 cut short: 25,600 images, 4 epochs, micro-batch 2 of 128.

    python -m train --config=configs/experiments/cifar10_short.py \\
        --workdir=runs/short --data_dir=DIR

About 13 minutes on one CPU core; docs/results/runs.csv has the outcome.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the short protocol that docs/results compares normalisers with."""
    config = base.get_config()
    config.dataset = "cifar10"
    config.train_examples = 25_600
    config.crop_padding = 4
    config.flip = True
    config.blocks_per_stage = 3
    config.batch_size = 128
    config.epochs = 4
    config.eval_epochs = 2
    return config
