"""The paper's section 4.1: Tables 1, 4 and 5, Figure 3.

KN is `kalman_paper`, with a learned gain q and noise R: only with these do its networks
have the parameters of Table 2. "Ours" is `kalman_wc`. Group norm has the 32 groups of
its authors.

"Batch size" is the micro-batch, one a GPU, and "the gradients are aggregated over 8
GPUs": 256 images an update in Table 1. For Tables 4 and 5 that makes 32 and 8. But the
released code has updates of 128 at a micro-batch of 2, which suggests as many images as
in Table 1. Both readings are run, at learning rates in proportion. For 256 speaks that
Inception-v2 has 45.9 % after 120,000 updates: of 8 images they are three quarters of an
epoch.

The schedule is left out as well: see configs/experiments/imagenet.py. There the rate
first falls at 150,000 updates, too late for the 73.1 % of Table 1 at 100,000. So that
column has a schedule of its own, our guess. The 170,000 updates of batch norm are 34
epochs of 256 images. The rate falls tenfold at 10, 18 and 26 epochs, the second time
10,000 updates before KN is to be there.
"""

from __future__ import annotations

from typing import Any

from configs.experiments import imagenet
from train.paper import printed
from train.paper.measure import OPTION_A, OPTION_B, Measure, steps_to
from train.paper.picture import Curve
from train.paper.trained import OURS, Column, Trained

_ROWS = {
    "BN": {"norm": "batch"},
    "BRN": {"norm": "batch_renorm"},
    "GN": {"norm": "group", "norm_options": {"num_groups": 32}},
    "KN": {"norm": "kalman_paper"},
    f"KN{OURS}": {"norm": "kalman_wc"},
}
_NO_GN = {name: keys for name, keys in _ROWS.items() if name != "GN"}
_NO_BRN = {name: keys for name, keys in _ROWS.items() if name != "BRN"}
_INCEPTION = {"network": "inception_v2"}
_FAST = {"epochs": 34, "step_epochs": (10, 18, 26)}


def _of_8_gpus(micro_batch_size: int) -> dict[str, Any]:
    """One micro-batch on each of 8 GPUs an update, and the learning rate for that."""
    images, full = 8 * micro_batch_size, imagenet.get_config()
    rate = full.learning_rate * images / full.batch_size
    return {"batch_size": images, "learning_rate": rate}


def _readings(
    column: str, measure: Measure, keys: dict[str, Any], small: dict[str, Any]
) -> dict[str, Column]:
    """A column of the paper by updates of 256 images, and by `small` ones."""
    return {
        f"{column}, 256 an update": Column(measure, keys),
        f"{column}, {small['batch_size']} an update": Column(measure, keys | small),
    }


TABLE1 = Trained(
    "ImageNet top-1 accuracy and steps to 73.1 %, batch size 32",
    imagenet.get_config(),
    printed.TABLE1,
    _NO_BRN,
    {
        "Inceptionv2": Column(OPTION_A, _INCEPTION),
        "Iters@73.1%": Column(steps_to(0.731), _INCEPTION | _FAST),
        "ResNet101": Column(OPTION_A, {"network": "resnet101"}),
        "ResNet50": Column(OPTION_A, {"network": "resnet50"}),
    },
)

TABLE4 = Trained(
    "ImageNet top-1 accuracy of ResNet-50, batch size 4, options A and B",
    imagenet.get_config(),
    printed.TABLE4,
    _ROWS,
    _readings("Option A", OPTION_A, {"micro_batch_size": 4}, _of_8_gpus(4))
    | _readings("Option B", OPTION_B, {"micro_batch_size": 4}, _of_8_gpus(4)),
)

#: 120,096 updates, of 5,004 an epoch: the first of the 90 epochs of the schedule
_SINGLE = {**_INCEPTION, "micro_batch_size": 1, "epochs": 24}
#: 120,000 updates, three quarters of an epoch
_SINGLE_8 = _of_8_gpus(1) | {"epochs": 1, "train_examples": 960_000}

TABLE5 = Trained(
    "ImageNet top-1 accuracy of Inception-v2 after 120k steps, batch size 1, option B",
    imagenet.get_config(),
    printed.TABLE5,
    _NO_GN,
    _readings("Acc @120k iters", OPTION_B, _SINGLE, _SINGLE_8),
)

FIGURE3 = Trained(
    "ImageNet top-1 accuracy of Inception-v2 by step, batch size 1, option A",
    imagenet.get_config(),
    printed.FIGURE3,
    _NO_GN,
    {"Option A": Column(OPTION_A, _SINGLE)},
    Curve("test_moving_accuracy", "option A, moving statistics"),
)
