"""ResNet-50 on ImageNet, the paper's section 4.1: micro-batches of 32, 8 an update.

    python -m train --config=configs/experiments/imagenet.py \\
        --workdir=runs/imagenet --data_dir=DIR

For its Table 4 add --config.micro_batch_size=4. The paper leaves out the schedule: ours
is that of Goyal et al., "Accurate, large minibatch SGD", 2017, at 256 images an update.

450,000 updates, for GPUs; not yet run.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = base.get_config()
    config.dataset = "imagenet2012"
    config.flip = True
    config.network = "resnet50"
    config.batch_size = 256
    config.micro_batch_size = 32
    config.epochs = 90
    config.schedule = "step"
    config.step_epochs = (30, 60, 80)
    config.step_factors = (0.1, 0.1, 0.1)
    config.weight_decay = 1e-4
    config.log_steps = 100
    config.eval_batch_size = 512
    return config
