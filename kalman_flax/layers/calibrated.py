"""What has a Kalman normaliser correct its predictions by past observations."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kalman_flax._filter.calibration import (
    Corrected,
    Correction,
    correct,
    uncorrected,
    update_correction,
)
from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import choose, is_known
from kalman_flax.layers.normalizer import finite_or_old

Change = Callable[[KalmanState], KalmanState]

#: what a calibrated normaliser keeps in ``batch_stats``
NAMES = Correction._fields


class NotStarted(UserWarning):
    """Calibration begins in the middle of training."""


def warn_if_not_started(kept: Collection[str]) -> None:
    """Warns where ``batch_stats`` hold no correction yet, and training will add it."""
    if not set(NAMES) <= set(kept):
        warnings.warn(
            "calibrate is set, but the variables hold no corrections: this step adds"
            " them, from its own micro-batch alone. Start them before training: from a"
            " checkpoint by kalman_flax.seed_calibration, from scratch by"
            " kalman_flax.calibrate.",
            NotStarted,
            stacklevel=2,
        )


@contextlib.contextmanager
def not_training() -> Iterator[None]:
    """Silences `NotStarted` for a pass that starts corrections, or only looks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotStarted)
        yield


class Calibrated:
    """Mixin: the running `Correction` in ``batch_stats``, where `calibrate` is set."""

    # What the module has that mixes this in.
    calibrate: Corrected | None
    momentum: float
    path: tuple[str, ...]
    is_initializing: Callable[[], bool]
    variable: Callable[..., Any]
    has_variable: Callable[[str, str], bool]
    get_variable: Callable[..., Any]
    put_variable: Callable[..., None]

    def _start_correction(self, channels: int) -> None:
        """Makes its variables. Inference, which has no use for them, does without."""
        if self.calibrate is None or not self.is_initializing():
            return
        for name, stat in uncorrected(channels)._asdict().items():
            self.variable("batch_stats", name, lambda stat=stat: stat)

    def _correction(self) -> Correction | None:
        """What past observations say of predictions, or None where nobody asks.

        Raises:
            ValueError: the variables come from a network that did not calibrate.
        """
        if self.calibrate is None:
            return None
        missing = [n for n in NAMES if not self.has_variable("batch_stats", n)]
        if missing:
            raise ValueError(
                f"KalmanNorm {'/'.join(self.path)!r} has calibrate={self.calibrate!r},"
                f" but batch_stats lack its {', '.join(missing)}: they are of a network"
                " without. Initialise this one, take the rest over by"
                " kalman_flax.load_batch_norm, and start it by kalman_flax.calibrate or"
                " kalman_flax.seed_calibration."
            )
        return Correction(*(self.get_variable("batch_stats", n) for n in NAMES))

    def _learn(
        self,
        correction: Correction,
        predicted: KalmanState,
        observed: KalmanState,
        predict_noise: Change,
        momentum: float | None = None,
    ) -> Correction:
        """The next correction; the old one where the prediction says nothing."""
        known = is_known(predicted)
        predicted = predict_noise(choose(known, predicted, KalmanState(0.0, 1.0)))
        k = self.momentum if momentum is None else momentum
        moved = update_correction(correction, predicted, observed, k)
        return jax.tree.map(
            lambda new, old: jnp.where(known, new, old), moved, correction
        )

    def _correcting(self, correction: Correction, predict_noise: Change) -> Change:
        """Adds R to a prediction, and then corrects it."""
        what = self.calibrate or "both"
        return lambda state: correct(predict_noise(state), correction, what)

    def _put_correction(self, new: Correction, old: Correction) -> None:
        """Keeps what was learned, but not in initialisation."""
        if self.is_initializing():
            return
        for name, stat in finite_or_old(new, old)._asdict().items():
            self.put_variable("batch_stats", name, stat)
