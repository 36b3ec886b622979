"""Networks by name: what `configs` and commands call them."""

from __future__ import annotations

import functools
from collections.abc import Callable

from kalman_flax.models.bottleneck_resnet import BottleneckResNet
from kalman_flax.models.inception import InceptionV2, SmallInception
from kalman_flax.models.network import Network
from kalman_flax.models.resnet import ResNet

#: Call with ``num_classes``, and what `normalization` returns:
#: ``NETWORKS["resnet50"](num_classes=1000, **normalization("kalman")._asdict())``.
NETWORKS: dict[str, Callable[..., Network]] = {
    # For small images
    "cifar_resnet": ResNet,
    "resnet32": functools.partial(ResNet, blocks_per_stage=5),
    "resnet110": functools.partial(ResNet, blocks_per_stage=18),
    "small_inception": SmallInception,
    # For 224x224 images
    "resnet50": functools.partial(BottleneckResNet, stage_sizes=(3, 4, 6, 3)),
    "resnet101": functools.partial(BottleneckResNet, stage_sizes=(3, 4, 23, 3)),
    "inception_v2": InceptionV2,
}
