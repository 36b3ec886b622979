"""A check of the port that takes hours: trained and tested on COCO's val2017.

    python -m train --config=configs/experiments/coco_short.py \\
        --config.norm=frozen_batch --config.init_from=resnet50.safetensors \\
        --workdir=runs/coco_short --data_dir=DIR

The schedule is that of detectron2's mask_rcnn_R_50_C4_training_acc_test.yaml, in its
quick_schedules, which overfits 5,000 images to see that training works: 8 images an
update, 12,000 updates, images of 600 / 1000 to train on and 800 / 1000 to test on, 256
regions. It expects, with frozen batch norm, 41.88 +- 0.7 box AP and 33.79 +- 0.5 mask
AP. All else is that of coco_c4: its losses, anchors and standardisation differ from
detectron2's, and so a number a point away is no proof of a fault.

Fine-tunes a classifier, see docs/fine-tuning.md. Not yet run: needs COCO and a GPU.
"""

from ml_collections import ConfigDict

from configs.experiments import coco_c4


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = coco_c4.get_config()
    config.train_split = "val"
    config.short_side, config.long_side = 600, 1000
    config.test_short_side = 800
    config.learning_rate = 0.02
    config.total_steps = 12_000
    config.warmup_steps = 100
    config.step_drops = (11_000, 11_600)
    return config
