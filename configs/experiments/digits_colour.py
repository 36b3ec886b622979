"""ResNet-14 on coloured digits: what the small Table 6 fine-tunes into a detector.

    python -m train --config=configs/experiments/digits_colour.py \\
        --workdir=runs/digits_colour

1,500 images of 32 x 32 pixels, one digit each, batch norm at micro-batch 64; nothing to
download. `python -m train.reproduce table6 --scale=short` makes the run itself, and one
with group norm.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the pre-training."""
    config = base.get_config()
    config.dataset = "digits32_colour"
    config.network = "resnet14"
    config.norm = "batch"
    config.batch_size = 64
    config.micro_batch_size = 64
    config.epochs = 20
    config.warmup_epochs = 1
    config.optimizer = "adamw"
    config.learning_rate = 0.003
    config.clip_norm = 1.0
    config.weight_decay = 1e-4
    config.eval_epochs = 20
    config.checkpoint_epochs = 5
    config.eval_batch_size = 99
    return config
