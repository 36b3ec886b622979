"""Batches on time: read ahead by threads or processes, and the wait for them timed."""

from __future__ import annotations

import collections
import contextlib
import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from train.engine.mesh import local_rows, take
from train.engine.task import Source

#: images, at most, that a thread or a process reads at a time
PIECE = 32
#: beyond, threads would only wait for each other to run Python
MOST_THREADS = 32

#: from the step and some rows of its batch to these, on the host
Read = Callable[[int, np.ndarray], Any]


def batches_of(
    mesh: Mesh,
    source: Source,
    size: int,
    index: Callable[[int], np.ndarray],
    workers: int = 0,
    key: Callable[[int], tuple[int, ...]] | None = None,
) -> Callable[[int], Any]:
    """Returns a map from the number of a batch to its examples, a pytree of arrays
    ``[size, ...]``, split over the devices.

    Args:
        mesh: the devices.
        source: what to read.
        size: examples a batch.
        index: from the number of a batch to its examples, ``[size]``.
        workers: as of `read_ahead`.
        key: from the number of a batch to that of its random numbers; None: without.
    """
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(source)):
        return lambda number: take(mesh, source, index(number))

    def read(number: int, rows: np.ndarray) -> Any:
        return source.read(index(number)[rows], key=key and key(number))

    return Feed(mesh, size, read, workers)


class Feed:
    """Batches by step, read ahead as long as the steps asked for follow each other.

    A batch depends on its step alone, and so nothing needs to be saved to go on from
    any of them. A process reads the rows of its own devices and no others.
    """

    def __init__(self, mesh: Mesh, batch_size: int, read: Read, workers: int = 0):
        """Describes the batches; nothing is read yet.

        Args:
            mesh: over whose devices a batch is split.
            batch_size: examples a batch, over all devices.
            read: gives rows of a batch.
            workers: as of `read_ahead`.
        """
        mine = local_rows(mesh, batch_size)
        self._mesh, self._read, self._workers = mesh, read, workers
        self._rows = np.flatnonzero(mine)
        self._place = np.cumsum(mine) - 1  # of a row of the batch among ours
        self._next: int | None = None
        self._batches: Iterator[Any] = iter(())

    def __call__(self, step: int) -> Any:
        """Returns the batch of `step`, split over the devices."""
        if step != self._next:
            self._batches = read_ahead(self._read, self._rows, step, self._workers)
        self._next = step + 1
        return take(self._mesh, next(self._batches), self._place)


def read_ahead(read: Read, rows: np.ndarray, step: int, workers: int) -> Iterator[Any]:
    """Yields `rows` of the batches of `step` and all steps after it, on the host.

    Args:
        read: gives rows of a batch.
        rows: which, ``[n]``.
        step: the first.
        workers: processes that read; 0: as many threads of this one as the machine has
            cores, up to `MOST_THREADS`. Neither changes a batch.

    Raises:
        ChildProcessError: one of them was killed.
    """
    import grain  # half a second, which only those pay who need it

    size = math.gcd(len(rows), PIECE)
    parts = len(rows) // size

    def piece(number: int) -> Any:
        step, part = divmod(number, parts)
        return read(step, rows[part * size : (part + 1) * size])

    threads = 1 if workers else min(os.cpu_count() or 1, MOST_THREADS)
    pieces = (
        grain.MapDataset.range(step * parts, sys.maxsize)
        .map(piece)
        .to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=2 * threads))
    )
    if workers:
        if not flags.FLAGS.is_parsed():  # grain has some, and hands them on
            flags.FLAGS.mark_as_parsed()
        pieces = pieces.mp_prefetch(
            grain.MultiprocessingOptions(workers, 2), worker_init_fn=_end_with_trainer
        )
    return _alive(iter(pieces.batch(parts, batch_fn=_join)))


def _alive(batches: Iterator[Any]) -> Iterator[Any]:
    """Yields `batches`.

    Raises:
        ChildProcessError: a process that reads them was killed.
    """
    try:
        yield from batches
    except RuntimeError as error:  # of grain, which has no type of its own for it
        if "terminated unexpectedly" not in str(error):
            raise
        raise ChildProcessError(
            "one of the data_workers was killed, perhaps for want of memory: fewer of"
            f" them need less. The same command goes on. ({error})"
        ) from error


def _end_with_trainer(*_: int) -> None:
    """Has this worker end when its trainer is killed, which cannot end it then."""

    trainer = multiprocessing.parent_process()
    assert trainer is not None  # this is a worker

    def wait() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _join(pieces: Iterable[Any]) -> Any:
    return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


class Ahead(contextlib.AbstractContextManager):
    """Has the batches of the next steps brought to the devices, by a thread.

    As grain's `device_put` would, but it times the wait, and takes batches in memory.
    """

    def __init__(self, batch: Callable[[int], Any], steps: range, depth: int = 2):
        """Starts with the first `depth` of `steps`.

        Args:
            batch: from the step to its examples; called in turn, by one thread.
            steps: for which `next` will be called, in this order.
            depth: batches to have ready.
        """
        self._batch, self._steps = batch, iter(steps)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._ready: collections.deque[Future[Any]] = collections.deque()
        self._waited, self._since = 0.0, time.monotonic()
        for _ in range(depth):
            self._start()

    def _start(self) -> None:
        for step in self._steps:
            self._ready.append(self._thread.submit(self._batch, step))
            break

    def next(self, under_way: Any) -> Any:
        """Returns the next batch.

        Args:
            under_way: what the devices still work at. Until they are done with it,
                nobody waits for data.
        """
        batch = self._ready.popleft()
        self._start()
        if not batch.done():
            jax.block_until_ready(under_way)
            start = time.monotonic()
            batch.result()
            self._waited += time.monotonic() - start
        return batch.result()

    def waited(self) -> float:
        """Returns the share of the time since the last call in which the devices had
        nothing to do for want of a batch."""
        now = time.monotonic()
        share = self._waited / (now - self._since)
        self._waited, self._since = 0.0, now
        return share

    def __exit__(self, *error: object) -> None:
        """Lets go of the batches that nobody will ask for."""
        self._thread.shutdown(wait=True, cancel_futures=True)
