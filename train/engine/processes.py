"""Several processes that train as one, on JAX's own distributed runtime."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

AUTO = "auto"
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Train with several processes: HOST:PORT of process 0, which must be free there;"
    f" or {AUTO}, on clusters that JAX detects, such as Slurm and Cloud TPU.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes train together.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0.", lower_bound=0
)


def join() -> None:
    """Meets the other processes that the flags speak of; without flags there are none.

    Must come before anything that asks JAX for its devices.

    Raises:
        ValueError: flags that do not go together.
    """
    coordinator, count, this = (
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
    )
    if coordinator == AUTO:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise ValueError(
                f"JAX detects no cluster here ({error}); give --coordinator=HOST:PORT,"
                " --num_processes and --process_id."
            ) from error
    elif coordinator is not None and count is not None and this is not None:
        if this >= count:
            raise ValueError(
                f"process_id is {this}; {count} processes are 0 to {count - 1}."
            )
        jax.distributed.initialize(coordinator, count, this)
    elif (coordinator, count, this) != (None, None, None):
        raise ValueError(
            "--coordinator=HOST:PORT, --num_processes and --process_id go together;"
            f" --coordinator={AUTO} finds out the others."
        )


def primary() -> bool:
    """Whether this is the process that prints, and writes all but checkpoints."""
    return jax.process_index() == 0


def check_equal(what: str, value: int) -> None:
    """Raises a ValueError, in all processes, unless `value` is the same in all.

    `multihost_utils.assert_equal` would not say which process has what.
    """
    if jax.process_count() == 1:
        return
    values = multihost_utils.process_allgather(np.int64(value)).tolist()
    if len(set(values)) > 1:
        raise ValueError(f"processes that train together differ in {what}: {values}.")


class Stopped(Exception):
    """A run was told to stop, and saved where it was."""


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Notes SIGTERM and the first Ctrl-C in place of dying of them.

    Yields a function of the number of updates done, to be asked after each: whether to
    stop. With several processes, JAX has all of them stop after the same update when
    one of them gets SIGTERM.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second one kills

    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.signal(number, note) for number in numbers]
    try:
        yield lambda done: asked
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
