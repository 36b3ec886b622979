"""After training: other statistics to infer by, checkpoints in and out."""

from kalman_flax.inference.checkpoint import export_batch_norm as export_batch_norm
from kalman_flax.inference.checkpoint import load_batch_norm as load_batch_norm
from kalman_flax.inference.example_weighing import weigh_example as weigh_example
from kalman_flax.inference.precise import precise_statistics as precise_statistics
from kalman_flax.inference.running import merge_running as merge_running
