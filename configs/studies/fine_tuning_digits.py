"""Study: fine-tuning on digits in colour what batch norm at 128 learned on CIFAR-10.

    python -m train.compare --config=configs/studies/fine_tuning_digits.py \\
        --seeds=3 --micro_batch_sizes=1 --workdir=runs/fine_tuning_digits

Starts from the same pre-training on CIFAR-10 as configs/studies/fine_tuning.py, which
says how to make it, and has the same variants, in 640 updates: after 160 nobody has
learned a digit. Rates are chosen on 300 training images that no update sees.
"""

from ml_collections import ConfigDict

from configs.studies import fine_tuning


def get_config() -> ConfigDict:
    """Returns the study."""
    config = fine_tuning.get_config()
    config.dataset = "digits32_colour"
    config.classes = ()
    config.flip = False  # a mirrored digit is none
    config.train_examples = 1_200
    config.validation_examples = 300
    config.total_steps = 640
    return config
