"""A slim Mask R-CNN on digit scenes, from scratch, at micro-batch 1: nothing to
download.

    python -m train --config=configs/experiments/scenes_detection.py \\
        --workdir=runs/scenes

2,000 updates of 8 scenes of 64 x 64. Nobody ran all of them. Optimiser and rate are
those by which one block a stage learned 16 scenes by heart, see `docs/detection.md`. By
SGD (rate 0.02) gradients had norms of 5 to 6, which `clip_norm` cut to 1: after 20
updates the masks' loss was 0.691, where it starts at 0.693.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = base.get_config()
    config.task = "detection"
    config.dataset = "scenes"
    config.image_size = 64
    config.network = "mask_rcnn_small"
    config.batch_size = 8
    config.micro_batch_size = 1
    config.epochs = 0
    config.total_steps = 2_000
    config.optimizer = "adamw"
    config.learning_rate = 0.003
    config.warmup_steps = 200
    config.clip_norm = 1.0
    config.weight_decay = 1e-4
    config.eval_epochs = 4
    config.checkpoint_epochs = 2
    config.eval_batch_size = 50
    return config
