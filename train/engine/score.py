"""Sums over a split, in which every example counts once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

from kalman_flax import compiler_options
from train.engine.feed import batches_of
from train.engine.mesh import DEVICES, make_key, over_devices
from train.engine.task import Source


class Totals:
    """The total over a split of what is found in its batches."""

    def __init__(self, sums: Callable[..., Any], config: Any, mesh: Mesh):
        """Describes the sums; they are compiled when first asked for.

        Args:
            sums: from ``(state, batch, counts, keys, *more)`` to a pytree of sums over
                the examples of a batch that count: those where `counts`, ``[N]`` bool,
                is true. `keys` has one of each micro-batch.
            config: of the run.
            mesh: its devices.
        """
        unit = config.micro_batch_size * mesh.size
        self._size = max(1, config.eval_batch_size // unit) * unit
        # As in training, see `replicas_of`, but shared over a batch of the test.
        self._replicas = (
            mesh.size
            if config.sync_statistics
            else self._size // config.micro_batch_size
        )
        self._sums, self._mesh, self._workers = sums, mesh, config.data_workers
        self._key = make_key(mesh, config.seed)
        self._compiled = jax.jit(self._of_batch, compiler_options=compiler_options())

    def __call__(self, state: Any, source: Source, *more: Any) -> Any:
        """Returns the total, in float64.

        The last batch is filled up with examples from the start of `source`, which
        share statistics but do not count.
        """
        size, examples = self._size, source.examples

        def index(number: int) -> np.ndarray:
            return number * size + np.arange(size)

        batch = batches_of(
            self._mesh, source, size, lambda n: index(n) % examples, self._workers
        )
        totals: Any = None
        for number in range(math.ceil(examples / size)):
            counts, key = index(number) < examples, (self._key, number * size)
            found = self._compiled((state, more), batch(number), counts, key)
            found = jax.tree.map(np.float64, jax.device_get(found))
            totals = found if totals is None else jax.tree.map(np.add, totals, found)
        return totals

    def _of_batch(
        self, given: Any, batch: Any, counts: jax.Array, key: tuple[jax.Array, int]
    ) -> Any:
        keys = jax.random.split(jax.random.fold_in(*key), self._replicas)
        return over_devices(self._on_device, self._mesh)(given, batch, counts, keys)

    def _on_device(
        self, given: Any, batch: Any, counts: jax.Array, keys: jax.Array
    ) -> Any:
        state, more = given
        return lax.psum(self._sums(state, batch, counts, keys, *more), DEVICES)
