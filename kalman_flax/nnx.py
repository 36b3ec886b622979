"""Kalman Normalization for Flax NNX: `KalmanNorm`, where `flax.nnx.BatchNorm` went.

A model with `flax.nnx.BatchNorm` needs none of this: `kalman_flax.filtered(model)`.
"""

from kalman_flax.layers.nnx import KalmanNorm as KalmanNorm
