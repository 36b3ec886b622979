"""The authors' released micro-batch experiment: ResNet-32 on CIFAR-10, 400 epochs.

    python -m train --config=configs/experiments/cifar10_released.py \\
        --workdir=runs/released --data_dir=DIR

As their script: n = 5, micro-batches of 2 inside updates of 128 images; images minus
the mean image, over 128; crops after padding by 4, and flips; SGD with momentum 0.9
and rate 0.1, 0.01, 0.001, 0.0002 from epochs 0, 82, 123, 300; weight decay 2e-4. (Their
decay of the weight decay, x 0.2 every 480,000 steps, never happens in the 156,000 steps
of the run.) For micro-batches of 128 they use n = 18 and gain 0.95:

    --config.blocks_per_stage=18 --config.micro_batch_size=128 \\
        --config.norm_options.gain=0.95

The paper prints 92.7 (KN), 91.3 (group norm, 4 groups) and 91.2 (batch norm) at 2.

156,000 updates: two days at 125 images/s on two CPU cores. Not yet run to the end.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the released experiment."""
    config = base.get_config()
    config.dataset = "cifar10"
    config.standardize = "pixel"
    config.crop_padding = 4
    config.flip = True
    config.blocks_per_stage = 5
    config.norm = "kalman_released"
    config.batch_size = 128
    config.epochs = 400
    config.schedule = "step"
    config.step_epochs = (82, 123, 300)
    config.step_factors = (0.1, 0.1, 0.2)
    return config
