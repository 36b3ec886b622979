"""Normalisers and networks by name: what `configs` and commands call them."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from kalman_flax._filter.state import KalmanState
from kalman_flax.baselines.batch_channel_norm import BatchChannelNorm
from kalman_flax.baselines.batch_renorm import BatchRenorm
from kalman_flax.baselines.cross_iteration import (
    CrossIterationBatchNorm,
    CrossIterationConv,
)
from kalman_flax.baselines.evonorm import EvoNormB0, EvoNormS0
from kalman_flax.baselines.filter_response_norm import FilterResponseNorm
from kalman_flax.baselines.flax_norms import (
    BatchNorm,
    FrozenBatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
)
from kalman_flax.baselines.moving_average_norm import MovingAverageBatchNorm
from kalman_flax.baselines.online_norm import OnlineNorm
from kalman_flax.baselines.proxy_norm import ProxyNorm
from kalman_flax.baselines.scaled_weight_norm import scaled_relu, scaled_weight_conv
from kalman_flax.baselines.weight_norm import Bias, weight_norm_conv
from kalman_flax.layers.functions import relu
from kalman_flax.layers.group_kalman_norm import GroupKalmanNorm
from kalman_flax.layers.kalman_norm import KalmanNorm
from kalman_flax.layers.linear import (
    Conv,
    centre_kernel,
    standardize_kernel,
)
from kalman_flax.layers.presets import (
    LiteralPaperKalmanNorm,
    PaperGroupKalmanNorm,
    PaperKalmanNorm,
    ReleasedKalmanNorm,
)
from kalman_flax.layers.signal import Signal
from kalman_flax.models.bottleneck_resnet import BottleneckResNet
from kalman_flax.models.detection.fpn import MaskRCNNFPN
from kalman_flax.models.detection.mask_rcnn import MaskRCNN
from kalman_flax.models.detection.recipe import Recipe
from kalman_flax.models.inception import InceptionV2, SmallInception
from kalman_flax.models.network import Network
from kalman_flax.models.nf_resnet import NFResNet
from kalman_flax.models.resnet import ResNet
from kalman_flax.models.unet import UNet


class Normalization(NamedTuple):
    """What a network is told of its normaliser: ``ResNet(..., **n._asdict())``.

    Attributes:
        norm: factory of the normaliser.
        conv: factory of the convolutions.
        input_state: what the filter knows of the input, or None.
        activation: what the network applies to what is normalised; the identity for a
            normaliser that has a nonlinearity of its own.
    """

    norm: Callable[..., nn.Module]
    conv: Callable[..., nn.Module] = Conv
    input_state: KalmanState | None = KalmanState(0.0, 1.0)
    activation: Callable[[Signal], Signal] = relu


def _identity(x: Signal) -> Signal:
    return x


NORMALIZERS: dict[str, Normalization] = {
    # By the statistics of the micro-batch
    "batch": Normalization(BatchNorm),
    "batch_renorm": Normalization(BatchRenorm),
    "frozen_batch": Normalization(FrozenBatchNorm),
    "moving_average": Normalization(
        MovingAverageBatchNorm, conv=functools.partial(Conv, kernel_map=centre_kernel)
    ),
    "cross_iteration": Normalization(CrossIterationBatchNorm, conv=CrossIterationConv),
    "batch_channel": Normalization(functools.partial(BatchChannelNorm, num_groups=4)),
    "online": Normalization(OnlineNorm),
    "evonorm_b0": Normalization(EvoNormB0, activation=_identity),
    # By those of each image, or by none
    "weight": Normalization(Bias, conv=weight_norm_conv),
    "normalizer_free": Normalization(
        Bias, conv=scaled_weight_conv, activation=scaled_relu
    ),
    "layer": Normalization(LayerNorm),
    "instance": Normalization(InstanceNorm),
    "group": Normalization(functools.partial(GroupNorm, num_groups=4)),
    "proxy_group": Normalization(
        functools.partial(ProxyNorm, num_groups=4), activation=_identity
    ),
    "filter_response": Normalization(FilterResponseNorm, activation=_identity),
    "evonorm_s0": Normalization(
        functools.partial(EvoNormS0, num_groups=4), activation=_identity
    ),
    # By the filter
    "kalman": Normalization(KalmanNorm),
    "kalman_paper": Normalization(PaperKalmanNorm),
    "kalman_paper_mc": Normalization(
        PaperKalmanNorm, conv=functools.partial(Conv, transition="monte_carlo")
    ),
    "kalman_paper_literal": Normalization(LiteralPaperKalmanNorm),
    "kalman_mc": Normalization(
        KalmanNorm, conv=functools.partial(Conv, transition="monte_carlo")
    ),
    # The released code starts with no state: its first normaliser only observes.
    "kalman_released": Normalization(ReleasedKalmanNorm, input_state=None),
    "group_kalman": Normalization(functools.partial(GroupKalmanNorm, num_groups=4)),
    "group_kalman_paper": Normalization(
        functools.partial(PaperGroupKalmanNorm, num_groups=4)
    ),
}

#: Call with ``num_classes``, and what `normalization` returns:
#: ``NETWORKS["resnet50"](num_classes=1000, **normalization("kalman")._asdict())``.
NETWORKS: dict[str, Callable[..., Network]] = {
    # For small images
    "cifar_resnet": ResNet,
    "resnet32": functools.partial(ResNet, blocks_per_stage=5),
    "resnet110": functools.partial(ResNet, blocks_per_stage=18),
    "cifar_resnet_v1": functools.partial(ResNet, pre_activation=False),
    "resnet32_v1": functools.partial(ResNet, blocks_per_stage=5, pre_activation=False),
    "resnet110_v1": functools.partial(
        ResNet, blocks_per_stage=18, pre_activation=False
    ),
    "nf_resnet": NFResNet,  # by itself, or with the norm "normalizer_free"
    "small_inception": SmallInception,
    "resnet14": functools.partial(
        BottleneckResNet, stage_sizes=(1, 1, 1, 1), width=16, stem_pool=False
    ),
    # For 224x224 images
    "resnet50": functools.partial(BottleneckResNet, stage_sizes=(3, 4, 6, 3)),
    "resnet101": functools.partial(BottleneckResNet, stage_sizes=(3, 4, 23, 3)),
    "inception_v2": InceptionV2,
}

#: The same, of networks that give logits of every pixel, ``[N, H, W, num_classes]``.
SEGMENTERS: dict[str, Callable[..., Network]] = {
    "unet": UNet,
    "unet_small": functools.partial(UNet, width=16, depth=2),  # for small images
}

#: The same, of networks that find objects, see `MaskRCNN`.
DETECTORS: dict[str, Callable[..., MaskRCNN]] = {
    "mask_rcnn_c4": MaskRCNN,
    "mask_rcnn_fpn": MaskRCNNFPN,
    "mask_rcnn_small": functools.partial(  # for images of 64x64
        MaskRCNN,
        recipe=Recipe.small(),
        stage_sizes=(2, 2, 2, 1),
        width=16,
        stem_pool=False,
    ),
    "mask_rcnn_small_fpn": functools.partial(  # the same
        MaskRCNNFPN,
        recipe=Recipe.small_fpn(),
        stage_sizes=(2, 2, 2, 1),
        width=16,
        stem_pool=False,
        pyramid_channels=32,
        hidden=64,
        canonical_size=64,
    ),
}

#: Ends of names, and the kernels that they stand for.
KERNEL_MAPS = {"_ws": standardize_kernel, "_wc": centre_kernel}


def normalization(
    name: str,
    *,
    momentum: float = 0.99,
    axis_name: str | Sequence[str] | None = None,
    known: Mapping[str, Normalization] = NORMALIZERS,
    **options: Any,
) -> Normalization:
    """Looks up a normaliser and sets its attributes.

    Args:
        name: a key of `known`; ``"_ws"`` or ``"_wc"`` at its end standardises or
            centres the kernels, see `KERNEL_MAPS`.
        momentum: of the running statistics; unused by those that keep none.
        axis_name: mapped axes to share statistics over; unused by those that keep no
            running statistics: those of one image are shared with no other.
        known: the normalisers by name.
        **options: attributes of the normaliser.

    Raises:
        ValueError: unknown name or attribute, both are listed; a value that the
            attribute cannot have.
    """
    stem, _, suffix = name.rpartition("_")
    kernel_map = KERNEL_MAPS.get(f"_{suffix}")
    entry = known.get(name if kernel_map is None else stem)
    if entry is None:
        raise ValueError(
            f"unknown normaliser {name!r}; known are {', '.join(known)}, each also with"
            f" standardised kernels: NAME{', NAME'.join(KERNEL_MAPS)}."
        )
    if kernel_map is not None:
        conv = functools.partial(entry.conv, kernel_map=kernel_map)
        entry = entry._replace(conv=conv)
    if "hand_on" in options:  # as the configs of old runs call it
        warnings.warn("hand_on is propagate now", DeprecationWarning, stacklevel=2)
        options["propagate"] = options.pop("hand_on")
    cls: Any = (
        entry.norm.func if isinstance(entry.norm, functools.partial) else entry.norm
    )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    del fields["parent"], fields["name"]
    if unknown := sorted(set(options) - fields.keys()):
        raise ValueError(
            f"{cls.__name__} ({name!r}) has no attribute {unknown};"
            f" it has {sorted(fields)}."
        )
    if "momentum" in fields:  # `nn.GroupNorm`, too, would take an axis
        shared = {"momentum": momentum, "axis_name": axis_name}
        options |= {name: shared[name] for name in fields.keys() & shared.keys()}
    norm = functools.partial(entry.norm, **options)
    norm(parent=None)  # refuses what it cannot be
    return entry._replace(norm=norm)
