"""Loss and accuracy on a split, under both options of the paper."""

from __future__ import annotations

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

from kalman_flax.baselines.example_weighing import weigh_example
from kalman_flax.layers.linear import RNG
from train.data import Split
from train.encoded import Encoded
from train.feed import Feed
from train.mesh import DEVICES, SAME, SPLIT, take
from train.step import Metrics, TrainState, apply_replicas


def make_evaluate(
    network: nn.Module,
    standardize: Callable[[jax.Array], jax.Array],
    config: Any,
    mesh: Mesh,
) -> Callable[..., dict[str, float]]:
    """Returns ``(state, split) -> metrics``: loss and accuracy under both options.

    ``moving_*`` normalises by the moving statistics (option A), ``batch_*`` by those of
    each micro-batch of the split (option B). Every image counts exactly once: the last
    batch is filled up with images from the start of the split, which share statistics
    but do not count. A third argument, a number, is a `weigh_example`: then there is
    ``weighed_*`` alone, option A with every image weighed into its statistics.
    """
    unit = config.micro_batch_size * mesh.size
    size = max(1, config.eval_batch_size // unit) * unit
    # As in training, see `replicas_of`.
    replicas = mesh.size if config.sync_statistics else size // config.micro_batch_size

    def on_device(
        state: TrainState,
        batch: Split,
        counts: jax.Array,
        keys: jax.Array,
        example_weight: jax.Array | None,
    ) -> Metrics:
        images = standardize(batch.images)

        def infer() -> jax.Array:
            return network.apply(
                state.variables, images, use_running_average=True, rngs={RNG: keys[0]}
            )

        if example_weight is None:
            logits, _ = apply_replicas(network, state.variables, images, keys)
            outputs = {"moving": infer(), "batch": logits}
        else:
            with weigh_example(example_weight):
                outputs = {"weighed": infer()}
        result = {}
        for name, logits in outputs.items():
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            correct = jnp.argmax(logits, -1) == batch.labels
            result[f"{name}_loss"] = jnp.sum(loss, where=counts)
            result[f"{name}_accuracy"] = jnp.sum(correct, where=counts)
        return lax.psum(result, DEVICES)

    over_devices = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(SAME, SPLIT, SPLIT, SPLIT, SAME),
        out_specs=SAME,
    )

    @jax.jit
    def sums(
        state: TrainState,
        batch: Split,
        counts: jax.Array,
        start: int,
        example_weight: jax.Array | None,
    ) -> Metrics:
        key = jax.random.fold_in(jax.random.key(config.seed), start)
        keys = jax.random.split(key, replicas)
        return over_devices(state, batch, counts, keys, example_weight)

    def evaluate(
        state: TrainState, split: Split | Encoded, example_weight: float | None = None
    ) -> dict[str, float]:
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
        totals: dict[str, float] = {}
        for number in range(math.ceil(examples / size)):
            counts = index(number) < examples
            found = sums(state, batch(number), counts, number * size, example_weight)
            for name, value in jax.device_get(found).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return {name: total / examples for name, total in totals.items()}

    return evaluate
