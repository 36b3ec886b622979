"""A classifier of digits fine-tuned into a slim Mask R-CNN on digit scenes.

    python -m train --config=configs/experiments/digits_colour.py \\
        --workdir=runs/digits_colour
    python -m train --config=configs/experiments/scenes_fine_tuning.py \\
        --workdir=runs/scenes_fine_tuning

One image a micro-batch. `python -m train.reproduce table6 --scale=short` makes these
runs for each of its normalisers.
"""

from ml_collections import ConfigDict

from configs.experiments import coco_c4, scenes_detection


def get_config() -> ConfigDict:
    """Returns the fine-tuning."""
    config = scenes_detection.get_config()
    config.init_from = "runs/digits_colour"
    config.new_layers = coco_c4.get_config().new_layers
    # The stages of the classifier, ResNet-14; fewer regions, for the time of a CPU.
    config.network_options = ConfigDict({"stage_sizes": (1, 1, 1, 1)})
    config.network_options.roi_samples = 16
    config.test_examples = 100
    config.batch_size = 2
    config.total_steps = 1_000
    config.warmup_steps = 100
    config.eval_epochs = 10
    return config
