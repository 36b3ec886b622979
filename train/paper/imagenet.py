"""The paper's section 4.1: Tables 1, 4 and 5, Figure 3.

KN is `kalman_paper`, with a learned gain q and noise R: only with these do its networks
have the parameters of Table 2. "Ours" is `kalman_wc`. Group norm has the 32 groups of
its authors. "Batch size" is the micro-batch; the paper leaves out how many images an
update has, and the schedule: see configs/experiments/imagenet.py.
"""

from __future__ import annotations

from configs.experiments import imagenet
from train.paper import printed
from train.paper.measure import OPTION_A, OPTION_B, steps_to
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

TABLE1 = Trained(
    "ImageNet top-1 accuracy and steps to 73.1 %, batch size 32",
    imagenet.get_config(),
    printed.TABLE1,
    _NO_BRN,
    {
        "Inceptionv2": Column(OPTION_A, _INCEPTION),
        "Iters@73.1%": Column(steps_to(0.731), _INCEPTION),
        "ResNet101": Column(OPTION_A, {"network": "resnet101"}),
        "ResNet50": Column(OPTION_A, {"network": "resnet50"}),
    },
)

TABLE4 = Trained(
    "ImageNet top-1 accuracy of ResNet-50, batch size 4, options A and B",
    imagenet.get_config(),
    printed.TABLE4,
    _ROWS,
    {
        "Option A": Column(OPTION_A, {"micro_batch_size": 4}),
        "Option B": Column(OPTION_B, {"micro_batch_size": 4}),
    },
)

#: 120,096 updates, of 5,004 an epoch: the first of the 90 epochs of the schedule
_SINGLE = {**_INCEPTION, "micro_batch_size": 1, "epochs": 24}

TABLE5 = Trained(
    "ImageNet top-1 accuracy of Inception-v2 after 120k steps, batch size 1, option B",
    imagenet.get_config(),
    printed.TABLE5,
    _NO_GN,
    {"Acc @120k iters": Column(OPTION_B, _SINGLE)},
)

FIGURE3 = Trained(
    "ImageNet top-1 accuracy of Inception-v2 by step, batch size 1, option A",
    imagenet.get_config(),
    printed.FIGURE3,
    _NO_GN,
    {"Option A": Column(OPTION_A, _SINGLE)},
    Curve("test_moving_accuracy", "option A, moving statistics"),
)
