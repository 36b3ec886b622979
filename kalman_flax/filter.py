"""The filter by itself: pure functions over `KalmanState`.

Observe a micro-batch, predict through an operation, update, normalise. Arrays and
pytrees in and out; no Flax. The layers and `filtered` are built of these.
"""

from kalman_flax._filter.calibration import Correction as Correction
from kalman_flax._filter.calibration import correct as correct
from kalman_flax._filter.calibration import merged_corrections as merged_corrections
from kalman_flax._filter.calibration import uncorrected as uncorrected
from kalman_flax._filter.calibration import update_correction as update_correction
from kalman_flax._filter.convolution import predict_conv as predict_conv
from kalman_flax._filter.observe import observe as observe
from kalman_flax._filter.pool import predict_average as predict_average
from kalman_flax._filter.pool import predict_avg_pool as predict_avg_pool
from kalman_flax._filter.predict import predict_affine as predict_affine
from kalman_flax._filter.predict import predict_concatenate as predict_concatenate
from kalman_flax._filter.predict import predict_dense as predict_dense
from kalman_flax._filter.predict import predict_dropout as predict_dropout
from kalman_flax._filter.predict import predict_group as predict_group
from kalman_flax._filter.predict import predict_pad_channels as predict_pad_channels
from kalman_flax._filter.predict import predict_pointwise as predict_pointwise
from kalman_flax._filter.predict import predict_product as predict_product
from kalman_flax._filter.predict import predict_relu as predict_relu
from kalman_flax._filter.predict import predict_sum as predict_sum
from kalman_flax._filter.sampling import sample_conv as sample_conv
from kalman_flax._filter.sampling import sample_dense as sample_dense
from kalman_flax._filter.state import KalmanState as KalmanState
from kalman_flax._filter.state import for_channels as for_channels
from kalman_flax._filter.update import normalize as normalize
from kalman_flax._filter.update import normalized_state as normalized_state
from kalman_flax._filter.update import reject_outlier as reject_outlier
from kalman_flax._filter.update import update as update
