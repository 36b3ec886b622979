"""Kalman Normalization for JAX and Flax."""

from kalman_flax.baselines.batch_renorm import BatchRenorm as BatchRenorm
from kalman_flax.baselines.cross_iteration import (
    CrossIterationBatchNorm as CrossIterationBatchNorm,
)
from kalman_flax.baselines.cross_iteration import (
    CrossIterationConv as CrossIterationConv,
)
from kalman_flax.baselines.evonorm import EvoNormB0 as EvoNormB0
from kalman_flax.baselines.evonorm import EvoNormS0 as EvoNormS0
from kalman_flax.baselines.example_weighing import weigh_example as weigh_example
from kalman_flax.baselines.filter_response_norm import (
    FilterResponseNorm as FilterResponseNorm,
)
from kalman_flax.baselines.flax_norms import BatchNorm as BatchNorm
from kalman_flax.baselines.flax_norms import FrozenBatchNorm as FrozenBatchNorm
from kalman_flax.baselines.flax_norms import GroupNorm as GroupNorm
from kalman_flax.baselines.flax_norms import InstanceNorm as InstanceNorm
from kalman_flax.baselines.flax_norms import LayerNorm as LayerNorm
from kalman_flax.baselines.moving_average_norm import (
    MovingAverageBatchNorm as MovingAverageBatchNorm,
)
from kalman_flax.baselines.online_norm import OnlineNorm as OnlineNorm
from kalman_flax.baselines.precise import precise_statistics as precise_statistics
from kalman_flax.baselines.weight_norm import Bias as Bias
from kalman_flax.baselines.weight_norm import weight_norm_conv as weight_norm_conv
from kalman_flax.checkpoint import export_batch_norm as export_batch_norm
from kalman_flax.checkpoint import load_batch_norm as load_batch_norm
from kalman_flax.convolution import predict_conv as predict_conv
from kalman_flax.layers.functions import activation as activation
from kalman_flax.layers.functions import avg_pool as avg_pool
from kalman_flax.layers.functions import concatenate as concatenate
from kalman_flax.layers.functions import global_avg_pool as global_avg_pool
from kalman_flax.layers.functions import max_pool as max_pool
from kalman_flax.layers.functions import pad_channels as pad_channels
from kalman_flax.layers.functions import relu as relu
from kalman_flax.layers.group_kalman_norm import GroupKalmanNorm as GroupKalmanNorm
from kalman_flax.layers.kalman_norm import KalmanNorm as KalmanNorm
from kalman_flax.layers.kalman_norm import PaperKalmanNorm as PaperKalmanNorm
from kalman_flax.layers.kalman_norm import ReleasedKalmanNorm as ReleasedKalmanNorm
from kalman_flax.layers.linear import Conv as Conv
from kalman_flax.layers.linear import Dense as Dense
from kalman_flax.layers.linear import centre_kernel as centre_kernel
from kalman_flax.layers.linear import standardize_kernel as standardize_kernel
from kalman_flax.layers.remat import remat as remat
from kalman_flax.layers.running import merge_running as merge_running
from kalman_flax.layers.signal import Signal as Signal
from kalman_flax.models.bottleneck_resnet import BottleneckResNet as BottleneckResNet
from kalman_flax.models.inception import InceptionV2 as InceptionV2
from kalman_flax.models.inception import SmallInception as SmallInception
from kalman_flax.models.network import Network as Network
from kalman_flax.models.registry import NETWORKS as NETWORKS
from kalman_flax.models.resnet import ResNet as ResNet
from kalman_flax.observe import observe as observe
from kalman_flax.predict import predict_affine as predict_affine
from kalman_flax.predict import predict_avg_pool as predict_avg_pool
from kalman_flax.predict import predict_concatenate as predict_concatenate
from kalman_flax.predict import predict_dense as predict_dense
from kalman_flax.predict import predict_group as predict_group
from kalman_flax.predict import predict_pad_channels as predict_pad_channels
from kalman_flax.predict import predict_pointwise as predict_pointwise
from kalman_flax.predict import predict_relu as predict_relu
from kalman_flax.predict import predict_sum as predict_sum
from kalman_flax.registry import KERNEL_MAPS as KERNEL_MAPS
from kalman_flax.registry import NORMALIZERS as NORMALIZERS
from kalman_flax.registry import Normalization as Normalization
from kalman_flax.registry import normalization as normalization
from kalman_flax.sampling import sample_conv as sample_conv
from kalman_flax.sampling import sample_dense as sample_dense
from kalman_flax.state import KalmanState as KalmanState
from kalman_flax.update import normalize as normalize
from kalman_flax.update import normalized_state as normalized_state
from kalman_flax.update import reject_outlier as reject_outlier
from kalman_flax.update import update as update
