"""The normalisers that ours are compared with, under the same contract."""

from kalman_flax.baselines.batch_channel_norm import (
    BatchChannelNorm as BatchChannelNorm,
)
from kalman_flax.baselines.batch_renorm import BatchRenorm as BatchRenorm
from kalman_flax.baselines.cross_iteration import (
    CrossIterationBatchNorm as CrossIterationBatchNorm,
)
from kalman_flax.baselines.cross_iteration import (
    CrossIterationConv as CrossIterationConv,
)
from kalman_flax.baselines.evonorm import EvoNormB0 as EvoNormB0
from kalman_flax.baselines.evonorm import EvoNormS0 as EvoNormS0
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
from kalman_flax.baselines.proxy_norm import ProxyNorm as ProxyNorm
from kalman_flax.baselines.scaled_weight_norm import (
    ScaledStandardization as ScaledStandardization,
)
from kalman_flax.baselines.scaled_weight_norm import scaled_relu as scaled_relu
from kalman_flax.baselines.scaled_weight_norm import (
    scaled_weight_conv as scaled_weight_conv,
)
from kalman_flax.baselines.weight_norm import Bias as Bias
from kalman_flax.baselines.weight_norm import weight_norm_conv as weight_norm_conv
