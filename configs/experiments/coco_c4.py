"""Mask R-CNN of ResNet-50-C4 on COCO 2017, the paper's Table 6.

    python -m train --config=configs/experiments/coco_c4.py \\
        --config.init_from=resnet50.safetensors --workdir=runs/coco --data_dir=DIR

The paper says: ResNet-50 up to conv4, 256 regions an image, shorter side 800 and longer
side 1333 at most, 280,000 updates. What it leaves out is here that of tensorpack's
examples/FasterRCNN at commit edac0543, which has a row of exactly these numbers with
frozen batch norm: 36.8 box AP, 32.1 mask AP. The paper prints 36.7 / 32.1 for frozen
batch norm, 37.7 / 32.5 for group norm, 37.8 / 33.1 for KN. tensorpack's frozen batch
norm with 512 regions and 360,000 updates has 37.8 / 33.2: what KN gains is the size of
what a longer schedule gains, and one seed does not tell them apart.

Fine-tunes a classifier, see docs/fine-tuning.md. Not yet run: needs COCO and a GPU.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the experiment."""
    config = base.get_config()
    config.task = "detection"
    config.dataset = "coco"
    config.flip = True
    config.network = "mask_rcnn_c4"
    # The stem and the first stage stay as they come: no gradient, no decay.
    config.network_options = ConfigDict({"freeze_at": 2})
    config.freeze = ("stem*", "stage1_*")
    # What a classifier lacks; with mask_rcnn_fpn the pyramid too.
    config.new_layers = ("head/*", "rpn/*", "box_*", "mask_*", "lateral*", "output*")
    config.batch_size = 8
    config.micro_batch_size = 1
    config.learning_rate = 0.01
    config.weight_decay = 1e-4
    config.epochs = 0
    config.total_steps = 280_000
    config.warmup_steps = 1_000
    config.warmup_from = 1 / 3
    config.schedule = "step"
    config.step_drops = (150_000, 230_000)
    config.step_factors = (0.1, 0.1)
    config.log_steps = 100
    config.eval_epochs = 5
    config.eval_batch_size = 8
    return config
