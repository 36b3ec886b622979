"""Before and after training: statistics to begin with and to infer by, checkpoints."""

from kalman_flax.inference.calibration import calibrate as calibrate
from kalman_flax.inference.calibration import seed_calibration as seed_calibration
from kalman_flax.inference.checkpoint import export_batch_norm as export_batch_norm
from kalman_flax.inference.checkpoint import load_batch_norm as load_batch_norm
from kalman_flax.inference.example_weighing import weigh_example as weigh_example
from kalman_flax.inference.precise import precise_statistics as precise_statistics
from kalman_flax.inference.running import merge_running as merge_running
