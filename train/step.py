"""One parameter update and one evaluation, from micro-batches that share nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kalman_flax import merge_running
from kalman_flax.baselines.example_weighing import weigh_example
from kalman_flax.layers.linear import RNG
from train.data import Split, augment

Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """All that training changes.

    Attributes:
        step: number of parameter updates so far, int32 ``[]``.
        params, batch_stats, gradient_stats: the network's collections. What is in
            ``gradient_stats`` was observed in the backward pass: its gradient is its
            next value.
        opt_state: the optimiser's.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    gradient_stats: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Any]:
        """The network's collections, as its `apply` takes them."""
        return {
            "params": self.params,
            "batch_stats": self.batch_stats,
            "gradient_stats": self.gradient_stats,
        }


def create_state(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    image_shape: tuple[int, ...],
) -> TrainState:
    """Initialises network and optimiser for images of `image_shape`, ``[H, W, C]``."""
    variables = jax.jit(
        lambda k: network.init(
            {"params": k, RNG: k},
            jnp.zeros((1, *image_shape)),
            use_running_average=False,
        )
    )(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        gradient_stats=variables.get("gradient_stats", {}),
        opt_state=optimizer.init(variables["params"]),
    )


def micro_batches(x: jax.Array, micro_batch_size: int) -> jax.Array:
    """Splits ``[N, ...]`` into ``[N / micro_batch_size, micro_batch_size, ...]``."""
    if x.shape[0] % micro_batch_size:
        raise ValueError(
            f"a batch of {x.shape[0]} examples does not split into micro-batches of"
            f" {micro_batch_size}; choose a micro_batch_size that divides batch_size."
        )
    return x.reshape(-1, micro_batch_size, *x.shape[1:])


def apply_replicas(
    network: nn.Module,
    variables: dict[str, Any],
    images: jax.Array,
    micro_batch_size: int,
    key: jax.Array,
    mutable: Sequence[str] = ("batch_stats",),
) -> tuple[jax.Array, Any]:
    """Runs every micro-batch by its own statistics, as independent replicas.

    Args:
        network: maps images to logits.
        variables: the network's collections, the same for all replicas.
        images: ``[N, H, W, C]``.
        micro_batch_size: examples that share statistics; divides N.
        key: for the Monte Carlo transition.
        mutable: collections that the network may write.

    Returns:
        logits ``[N, num_classes]``, and the collections that each replica wrote, with a
        leading axis of replicas.
    """
    images = micro_batches(images, micro_batch_size)

    def forward(x: jax.Array, replica_key: jax.Array) -> tuple[jax.Array, Any]:
        return network.apply(
            variables,
            x,
            use_running_average=False,
            mutable=mutable,
            rngs={RNG: replica_key},
        )

    logits, written = jax.vmap(forward)(images, jax.random.split(key, len(images)))
    return logits.reshape(-1, logits.shape[-1]), written


def make_train_step(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    standardize: Callable[[jax.Array], jax.Array],
    config: Any,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the jitted update ``(state, train split, index) -> (state, metrics)``.

    `index` ``[batch_size]`` picks the examples. The loss is the mean cross-entropy per
    image; its gradient is taken outside the vmap over replicas. Random crops depend on
    seed and step alone, so a resumed run sees the same images.
    """

    def train_step(
        state: TrainState, train: Split, index: jax.Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        augment_key, replica_key = jax.random.split(key)
        images = augment(
            augment_key, train.images[index], config.crop_padding, config.flip
        )
        labels = train.labels[index]

        def loss_fn(learned: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, written = apply_replicas(
                network,
                state.variables | learned,
                standardize(images),
                config.micro_batch_size,
                replica_key,
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(loss), (logits, written)

        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (logits, written)), grads = gradient(
            {"params": state.params, "gradient_stats": state.gradient_stats}
        )
        # Summed over the replicas, each of which observed one.
        replicas = config.batch_size // config.micro_batch_size
        gradient_stats = jax.tree.map(lambda g: g / replicas, grads["gradient_stats"])
        grads = grads["params"]
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=merge_running(
                written.get("batch_stats", {}), config.stats_momentum
            ),
            gradient_stats=gradient_stats,
            opt_state=opt_state,
        )
        metrics = {
            "loss": loss,
            "accuracy": jnp.mean(jnp.argmax(logits, -1) == labels),
            "gradient_norm": optax.tree.norm(grads),
            "parameter_norm": optax.tree.norm(params),
        }
        return state, metrics

    return jax.jit(train_step, donate_argnums=0, compiler_options=_compiler_options())


def _compiler_options() -> dict[str, str]:
    """XLA:CPU drops optimisation barriers before it fuses; KalmanNorm needs its own.

    Without them it computes the filter's small vectors again at every pixel.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}


def make_evaluate(
    network: nn.Module,
    standardize: Callable[[jax.Array], jax.Array],
    config: Any,
) -> Callable[..., dict[str, float]]:
    """Returns ``(state, split) -> metrics``: loss and accuracy under both options.

    ``moving_*`` normalises by the moving statistics (option A), ``batch_*`` by those of
    each micro-batch of the split (option B). Every image counts exactly once: the last
    batch is filled up with images from the start of the split, which share statistics
    but do not count. A third argument, a number, is a `weigh_example`: then there is
    ``weighed_*`` alone, option A with every image weighed into its statistics.
    """
    micro = config.micro_batch_size
    size = max(1, config.eval_batch_size // micro) * micro

    @jax.jit
    def sums(
        state: TrainState,
        split: Split,
        index: jax.Array,
        counts: jax.Array,
        example_weight: jax.Array | None,
    ) -> Metrics:
        images, labels = standardize(split.images[index]), split.labels[index]
        key = jax.random.fold_in(jax.random.key(config.seed), index[0])

        def infer() -> jax.Array:
            return network.apply(
                state.variables, images, use_running_average=True, rngs={RNG: key}
            )

        if example_weight is None:
            batch, _ = apply_replicas(network, state.variables, images, micro, key)
            outputs = {"moving": infer(), "batch": batch}
        else:
            with weigh_example(example_weight):
                outputs = {"weighed": infer()}
        result = {}
        for name, logits in outputs.items():
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            correct = jnp.argmax(logits, -1) == labels
            result[f"{name}_loss"] = jnp.sum(loss, where=counts)
            result[f"{name}_accuracy"] = jnp.sum(correct, where=counts)
        return result

    def evaluate(
        state: TrainState, split: Split, example_weight: float | None = None
    ) -> dict[str, float]:
        examples = len(split.labels)
        totals: dict[str, float] = {}
        for start in range(0, examples, size):
            index = np.arange(start, start + size, dtype=np.int32)
            batch = sums(
                state, split, index % examples, index < examples, example_weight
            )
            for name, value in jax.device_get(batch).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return {name: total / examples for name, total in totals.items()}

    return evaluate
