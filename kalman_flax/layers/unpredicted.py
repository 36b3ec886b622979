"""The warning of a Kalman normaliser that cannot get a prediction."""

from __future__ import annotations

import warnings

import flax.linen as nn


def warn_of_plain_array(module: nn.Module) -> None:
    """Warns, once, that `module` got a plain array in training: no state comes with it,
    so that it is batch norm. Silent in initialisation, and where its gain is 1."""
    if module.is_initializing() or module.gain == 1.0:
        return
    warnings.warn(
        f"{type(module).__name__} got a plain array in training: without a prediction"
        " it is batch norm. Run the model through kalman_flax.filtered(model.apply,"
        " input_states={1: kalman_flax.KalmanState(0.0, 1.0)}), or give it a"
        " kalman_flax.Signal; kalman_flax.explain says what is predicted.",
        stacklevel=2,
    )
