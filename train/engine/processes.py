"""Several processes that train as one, on JAX's own distributed runtime."""

from __future__ import annotations

import atexit
import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final, Literal

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from train.engine import rendezvous

AUTO: Final = "auto"
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Train with several processes: HOST:PORT of process 0, which must be free there;"
    f" or {AUTO}, on clusters that JAX detects, such as Slurm and Cloud TPU."
    " Process 0 listens on all network interfaces, unless --coordinator_bind is given.",
)
_BIND = flags.DEFINE_string(
    "coordinator_bind",
    None,
    "IP:PORT on which process 0 listens: the address of one of its interfaces, with the"
    " port of --coordinator.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes train together."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_TIMEOUT = flags.DEFINE_integer(
    "join_timeout",
    600,
    "Seconds that processes wait for each other, at the start and before the first"
    " update.",
    lower_bound=1,
)
_peers: rendezvous.Peers | None = None


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Meets the other processes that the flags speak of; without flags there are none.

    Must come before anything that asks JAX for its devices. If another process is gone
    before the block is left, one line says so and the program ends.

    Raises:
        ValueError: flags that do not go together, or a process that does not come.
    """
    given = _checked()
    if given == AUTO:
        _find()
    elif given is not None:
        _gather(*given)
    try:
        yield
    except Stopped:
        _leave()
        raise
    except Exception as error:
        if _peers is not None:
            _peers.report(error)
        raise
    _leave()


def _find() -> None:
    """Meets the processes that JAX detects."""
    try:
        jax.distributed.initialize(initialization_timeout=_TIMEOUT.value)
    except ValueError as error:
        raise ValueError(
            f"JAX detects no cluster here ({error}); give --coordinator=HOST:PORT,"
            " --num_processes and --process_id."
        ) from error


def _gather(coordinator: str, count: int, this: int) -> None:
    """Meets the processes that the flags name."""
    global _peers
    bind = None
    if _BIND.value is not None:
        bind = rendezvous.parse(_BIND.value, "--coordinator_bind")
    _peers = rendezvous.Peers(this, count, _TIMEOUT.value)
    _peers.gather(*rendezvous.parse(coordinator), bind)
    jax.distributed.initialize(
        coordinator,
        count,
        this,
        initialization_timeout=_TIMEOUT.value,
        coordinator_bind_address=_BIND.value,
    )
    atexit.register(_peers.abandon)  # before JAX's own, which waits for all
    jax.devices()  # JAX gives these two minutes, so they come while all are here


def _leave() -> None:
    if _peers is not None:
        _peers.leave()


def _checked() -> tuple[str, int, int] | Literal["auto"] | None:
    """Returns the flags' coordinator, number of processes and number of this one; or
    `AUTO`; or None, where there are none.

    Raises:
        ValueError: they do not go together.
    """
    given = coordinator, count, this = (
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
    )
    together = (
        "--coordinator=HOST:PORT, --num_processes and --process_id go together;"
        f" --coordinator={AUTO} finds out the others."
    )
    if coordinator == AUTO:
        if (count, this, _BIND.value) != (None, None, None):
            raise ValueError(together)
        return AUTO
    if coordinator is not None:
        _, port = rendezvous.parse(coordinator)
    if given == (None, None, None) and _BIND.value is None:
        return None
    if coordinator is None or count is None or this is None:
        raise ValueError(together)
    if count < 1:
        raise ValueError(f"--num_processes is {count}; expected 1 or more.")
    if not 0 <= this < count:
        raise ValueError(
            f"--process_id is {this}; {count} processes are 0 to {count - 1}."
        )
    if _BIND.value is not None:
        _, bound = rendezvous.parse(_BIND.value, "--coordinator_bind")
        if bound != port:
            raise ValueError(
                f"--coordinator_bind has port {bound}, --coordinator {port}; give both"
                " the same."
            )
    return coordinator, count, this


def meet() -> None:
    """Waits for the other processes, with more patience than a collective has.

    Gloo, which connects CPUs, gives up after 30 s. With ``--coordinator=auto`` there is
    no such wait.
    """
    if _peers is not None:
        _peers.meet()


def primary() -> bool:
    """Whether this is the process that prints, and writes all but checkpoints."""
    return jax.process_index() == 0


def check_equal(what: str, value: int) -> None:
    """Raises a ValueError, in all processes, unless `value` is the same in all.

    `multihost_utils.assert_equal` would not say which process has what.
    """
    if jax.process_count() == 1:
        return
    meet()
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
