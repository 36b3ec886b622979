"""Kalman Normalization for JAX and Flax.

The names below are what networks are built of. The rest has a room of its own:

    kf.filter     pure functions over `KalmanState`: observe, predict_*, update, ...
    kf.baselines  the normalisers that ours are compared with
    kf.models     the networks
    kf.nnx        `KalmanNorm` for Flax NNX
    kf.inference  other statistics to infer by, checkpoints in and out
"""

import importlib
import warnings
from typing import Any

from kalman_flax import baselines as baselines
from kalman_flax import filter as filter
from kalman_flax import inference as inference
from kalman_flax import models as models
from kalman_flax import nnx as nnx
from kalman_flax._filter.state import KalmanState as KalmanState
from kalman_flax._kernels import compiler_options as compiler_options
from kalman_flax.filtered.explain import explain as explain
from kalman_flax.filtered.rules import register_rule as register_rule
from kalman_flax.filtered.transform import filtered as filtered
from kalman_flax.inference.calibration import calibrate as calibrate
from kalman_flax.inference.calibration import seed_calibration as seed_calibration
from kalman_flax.inference.checkpoint import export_batch_norm as export_batch_norm
from kalman_flax.inference.checkpoint import load_batch_norm as load_batch_norm
from kalman_flax.inference.running import merge_running as merge_running
from kalman_flax.layers.functions import Dropout as Dropout
from kalman_flax.layers.functions import activation as activation
from kalman_flax.layers.functions import avg_pool as avg_pool
from kalman_flax.layers.functions import concatenate as concatenate
from kalman_flax.layers.functions import global_avg_pool as global_avg_pool
from kalman_flax.layers.functions import max_pool as max_pool
from kalman_flax.layers.functions import pad_channels as pad_channels
from kalman_flax.layers.functions import relu as relu
from kalman_flax.layers.functions import resize as resize
from kalman_flax.layers.group_kalman_norm import GroupKalmanNorm as GroupKalmanNorm
from kalman_flax.layers.kalman_norm import KalmanNorm as KalmanNorm
from kalman_flax.layers.linear import Conv as Conv
from kalman_flax.layers.linear import ConvTranspose as ConvTranspose
from kalman_flax.layers.linear import Dense as Dense
from kalman_flax.layers.linear import centre_kernel as centre_kernel
from kalman_flax.layers.linear import standardize_kernel as standardize_kernel
from kalman_flax.layers.presets import LiteralPaperKalmanNorm as LiteralPaperKalmanNorm
from kalman_flax.layers.presets import PaperGroupKalmanNorm as PaperGroupKalmanNorm
from kalman_flax.layers.presets import PaperKalmanNorm as PaperKalmanNorm
from kalman_flax.layers.presets import ReleasedKalmanNorm as ReleasedKalmanNorm
from kalman_flax.layers.remat import remat as remat
from kalman_flax.layers.signal import Signal as Signal
from kalman_flax.pretrained import load_pretrained as load_pretrained
from kalman_flax.pretrained import read_pretrained as read_pretrained
from kalman_flax.registry import DETECTORS as DETECTORS
from kalman_flax.registry import NETWORKS as NETWORKS
from kalman_flax.registry import NORMALIZERS as NORMALIZERS
from kalman_flax.registry import SEGMENTERS as SEGMENTERS
from kalman_flax.registry import Normalization as Normalization
from kalman_flax.registry import normalization as normalization

__version__ = "0.2.0"

#: names that stood here until version 0.1, and the namespaces they are in now
_MOVED = {
    "BatchNorm": "baselines",
    "BatchRenorm": "baselines",
    "Bias": "baselines",
    "BottleneckResNet": "models",
    "CrossIterationBatchNorm": "baselines",
    "CrossIterationConv": "baselines",
    "EvoNormB0": "baselines",
    "EvoNormS0": "baselines",
    "FilterResponseNorm": "baselines",
    "FrozenBatchNorm": "baselines",
    "GroupNorm": "baselines",
    "InceptionV2": "models",
    "InstanceNorm": "baselines",
    "KERNEL_MAPS": "registry",
    "LayerNorm": "baselines",
    "MovingAverageBatchNorm": "baselines",
    "Network": "models",
    "OnlineNorm": "baselines",
    "ResNet": "models",
    "SmallInception": "models",
    "normalize": "filter",
    "normalized_state": "filter",
    "observe": "filter",
    "precise_statistics": "inference",
    "predict_affine": "filter",
    "predict_avg_pool": "filter",
    "predict_concatenate": "filter",
    "predict_conv": "filter",
    "predict_dense": "filter",
    "predict_group": "filter",
    "predict_pad_channels": "filter",
    "predict_pointwise": "filter",
    "predict_relu": "filter",
    "predict_sum": "filter",
    "reject_outlier": "filter",
    "sample_conv": "filter",
    "sample_dense": "filter",
    "update": "filter",
    "weigh_example": "inference",
    "weight_norm_conv": "baselines",
}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module 'kalman_flax' has no attribute {name!r}")
    place = f"kalman_flax.{_MOVED[name]}"
    warnings.warn(
        f"kalman_flax.{name} is {place}.{name} now; the old name will go in 0.3.",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(importlib.import_module(place), name)
