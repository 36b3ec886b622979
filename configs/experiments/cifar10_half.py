"""ResNet-8 on half of CIFAR-10's classes: what the fine-tuning study starts from.

    python -m train --config=configs/experiments/cifar10_half.py \\
        --workdir=runs/half_batch --data_dir=DIR

Classes 0 to 4, batch norm at 128, 8 epochs of 12,800 images. Group norm, which cannot
start from batch norm, has a pre-training of its own:

    python -m train --config=configs/experiments/cifar10_half.py --config.norm=group \\
        --workdir=runs/half_group --data_dir=DIR

and group norm with standardised kernels likewise, --config.norm=group_ws into
runs/half_group_ws.
"""

from ml_collections import ConfigDict

from configs.experiments import cifar10_tiny


def get_config() -> ConfigDict:
    """Returns the pre-training."""
    config = cifar10_tiny.get_config()
    config.classes = (0, 1, 2, 3, 4)
    config.norm = "batch"
    config.micro_batch_size = 128
    config.epochs = 8
    return config
