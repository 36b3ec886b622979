"""Times that are comparable on a busy machine: in turn, and as ratios."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np


def measure(run: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Times each function once a round, in turn, after one call to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for number in range(rounds + 1):
        for name, call in run.items():
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: list[float], baseline: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios round by round: what slows a whole round
    leaves them alone."""
    ratios = np.array(seconds) / np.array(baseline)
    return tuple(float(q) for q in np.quantile(ratios, (0.5, 0.25, 0.75)))
