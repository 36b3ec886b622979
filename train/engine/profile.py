"""A trace of some updates, for the profiler of TensorBoard or Perfetto."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax


def check_steps(steps: Sequence[int]) -> None:
    """Raises a ValueError unless `steps` is empty or an increasing pair."""
    if steps and (len(steps) != 2 or not 0 <= steps[0] < steps[1]):
        raise ValueError(
            f"profile_steps is {tuple(steps)}; expected (first, last), say (10, 13)."
        )


@contextlib.contextmanager
def profiler(
    steps: Sequence[int], folder: pathlib.Path
) -> Iterator[Callable[[int, Any], None]]:
    """Traces the updates from ``steps[0]`` up to, not including, ``steps[1]``.

    Yields a function of the number of updates done and the state, to be called before
    every update. Without `steps` it does nothing. What is still running at the end is
    written as well.
    """
    first, last = steps or (None, None)
    running = False

    def at(done: int, state: Any) -> None:
        nonlocal running
        if done == first:
            jax.profiler.start_trace(folder)
            running = True
        elif done == last and running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            running = False

    try:
        yield at
    finally:
        if running:
            jax.profiler.stop_trace()
