"""What a table reads from a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from train.studies.report import Run, options


class Measure(NamedTuple):
    """A number of a run that did not diverge.

    Attributes:
        of: the number, NaN if the run has none.
        unit: a key of `train.paper.result.FORMATS`.
        missing: why a run may have none.
    """

    of: Callable[[Run], float]
    unit: str = "accuracy (%)"
    missing: str = "diverged"

    def values(self, runs: list[Run]) -> list[float]:
        """Returns one for each run."""
        return [float("nan") if run.diverged else self.of(run) for run in runs]


#: the headline metric at the end by moving statistics, and by those of each micro-batch
OPTION_A = Measure(lambda run: 100 * run.summary[options(run.headline)[0]])
OPTION_B = Measure(lambda run: 100 * run.summary[options(run.headline)[-1]])


def steps_to(accuracy: float) -> Measure:
    """The updates until a test first gave `accuracy`, of 1, by moving statistics.

    To the next test, so no finer than `eval_epochs` are.
    """

    def of(run: Run) -> float:
        reached = (
            line["step"]
            for line in run.metrics
            if line.get(run.headline, 0.0) >= accuracy
        )
        return float(next(reached, "nan"))

    return Measure(of, "steps", "not reached")
