"""Loss, accuracy and confusion on a split, under both options of the paper."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from kalman_flax import compiler_options
from kalman_flax.inference.example_weighing import weigh_example
from kalman_flax.layers.linear import RNG
from train.data.batches import Split
from train.data.encoded import Encoded
from train.engine.feed import Feed
from train.engine.mesh import DEVICES, SAME, SPLIT, take
from train.engine.step import Metrics, TrainState, apply_replicas

#: with more classes than this, an image also counts if the right one is among so many
TOP = 5


def infer(network: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    """Returns the logits ``[N, num_classes]`` of standardised images by the moving
    statistics (option A)."""
    # The Monte Carlo transition asks for a key; nothing here depends on it.
    rngs = {RNG: jax.random.key(0)}
    return network.apply(variables, images, use_running_average=True, rngs=rngs)


def make_evaluate(
    network: nn.Module,
    standardize: Callable[[jax.Array], jax.Array],
    config: Any,
    mesh: Mesh,
) -> Callable[..., dict[str, float]]:
    """Returns ``(state, split) -> metrics``: loss and accuracy under both options.

    ``moving_*`` normalises by the moving statistics (option A), ``batch_*`` by those of
    each micro-batch of the split (option B). Where there are more than `TOP` classes,
    ``*_top5_accuracy`` is there too. A third argument, a number, is a `weigh_example`:
    then there is ``weighed_*`` alone, option A with every image weighed into its
    statistics.
    """

    def sums(
        state: TrainState,
        batch: Split,
        counts: jax.Array,
        keys: jax.Array,
        example_weight: jax.Array | None = None,
    ) -> Metrics:
        images = standardize(batch.images)
        if example_weight is None:
            moving = infer(network, state.variables, images)
            logits, _ = apply_replicas(network, state.variables, images, keys)
            outputs = {"moving": moving, "batch": logits}
        else:
            with weigh_example(example_weight):
                weighed = infer(network, state.variables, images)
            outputs = {"weighed": weighed}
        result = {}
        for name, logits in outputs.items():
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            correct = jnp.argmax(logits, -1) == batch.labels
            result[f"{name}_loss"] = jnp.sum(loss, where=counts)
            result[f"{name}_accuracy"] = jnp.sum(correct, where=counts)
            if logits.shape[-1] > TOP:
                _, best = lax.top_k(logits, TOP)
                among = jnp.any(best == batch.labels[:, None], -1)
                result[f"{name}_top{TOP}_accuracy"] = jnp.sum(among, where=counts)
        return result

    total = _make_total(sums, config, mesh)

    def evaluate(
        state: TrainState, split: Split | Encoded, example_weight: float | None = None
    ) -> dict[str, float]:
        more = () if example_weight is None else (example_weight,)
        totals = total(state, split, *more)
        return {name: float(value) / split.examples for name, value in totals.items()}

    return evaluate


def make_confusion(
    network: nn.Module,
    standardize: Callable[[jax.Array], jax.Array],
    config: Any,
    mesh: Mesh,
) -> Callable[[TrainState, Split | Encoded], np.ndarray]:
    """Returns ``(state, split) -> images``: of each class (row) how many the network
    takes for each (column), by moving statistics, ``[classes, classes]``."""

    def sums(
        state: TrainState, batch: Split, counts: jax.Array, keys: jax.Array
    ) -> jax.Array:
        images = standardize(batch.images)
        logits = infer(network, state.variables, images)
        classes = logits.shape[-1]
        true = jax.nn.one_hot(batch.labels, classes) * counts[:, None]
        return true.T @ jax.nn.one_hot(jnp.argmax(logits, -1), classes)

    total = _make_total(sums, config, mesh)
    return lambda state, split: np.rint(total(state, split)).astype(int)


def _make_total(
    sums: Callable[..., Any], config: Any, mesh: Mesh
) -> Callable[..., Any]:
    """Returns ``(state, split, *more)`` to the total over the split of what
    ``sums(state, batch, counts, keys, *more)`` finds in a batch, in float64.

    Every image counts exactly once: the last batch is filled up with images from the
    start of the split, which share statistics but do not count. `counts` says which
    images do, ``[N]`` bool; `keys` has one of each micro-batch.
    """
    unit = config.micro_batch_size * mesh.size
    size = max(1, config.eval_batch_size // unit) * unit
    # As in training, see `replicas_of`, but shared over a batch of the test.
    replicas = mesh.size if config.sync_statistics else size // config.micro_batch_size

    def on_device(
        state: TrainState, batch: Split, counts: jax.Array, keys: jax.Array, more: Any
    ) -> Any:
        return lax.psum(sums(state, batch, counts, keys, *more), DEVICES)

    over_devices = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(SAME, SPLIT, SPLIT, SPLIT, SAME),
        out_specs=SAME,
    )

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def of_batch(
        state: TrainState, batch: Split, counts: jax.Array, start: int, more: Any
    ) -> Any:
        key = jax.random.fold_in(jax.random.key(config.seed), start)
        return over_devices(state, batch, counts, jax.random.split(key, replicas), more)

    def total(state: TrainState, split: Split | Encoded, *more: Any) -> Any:
        examples = split.examples

        def index(number: int) -> np.ndarray:
            return number * size + np.arange(size)

        def in_memory(number: int) -> Split:
            return take(mesh, split, index(number) % examples)

        def read(number: int, rows: np.ndarray) -> Split:
            return split.read(index(number)[rows] % examples)

        batch = (
            in_memory
            if isinstance(split, Split)
            else Feed(mesh, size, read, config.data_workers)
        )
        totals: Any = None
        for number in range(math.ceil(examples / size)):
            counts = index(number) < examples
            found = of_batch(state, batch(number), counts, number * size, more)
            found = jax.tree.map(np.float64, jax.device_get(found))
            totals = found if totals is None else jax.tree.map(np.add, totals, found)
        return totals

    return total
