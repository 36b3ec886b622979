"""U-Net on digit scenes, micro-batch 1: the class of every pixel.

    python -m train --config=configs/experiments/scenes_segmentation.py \\
        --workdir=runs/scenes

1,500 made scenes of 64 x 64 pixels to train on and 300 to test on, nothing to download.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = base.get_config()
    config.task = "segmentation"
    config.dataset = "scenes"
    config.image_size = 64
    config.network = "unet_small"
    config.norm = "kalman_wc"
    config.batch_size = 8
    config.micro_batch_size = 1
    config.optimizer = "adamw"
    config.learning_rate = 0.003
    config.clip_norm = 1.0
    config.epochs = 0
    config.total_steps = 2_000
    config.warmup_steps = 200
    config.log_steps = 50
    config.eval_epochs = 4
    config.checkpoint_epochs = 4
    config.eval_batch_size = 50
    return config
