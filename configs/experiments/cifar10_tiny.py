"""ResNet-8 on CIFAR-10 cut very short: 12,800 images, 2 epochs, micro-batch 2 of 128.

    python -m train --config=configs/experiments/cifar10_tiny.py \\
        --workdir=runs/tiny --data_dir=DIR

About a minute on one CPU core. What the studies start from, where many runs are to fit
a CPU: it tells large differences, not the last point.
"""

from ml_collections import ConfigDict

from configs.experiments import cifar10_short


def get_config() -> ConfigDict:
    """Returns the protocol of the studies."""
    config = cifar10_short.get_config()
    config.train_examples = 12_800
    config.epochs = 2
    config.blocks_per_stage = 1
    return config
