"""One parameter update, from micro-batches that share nothing."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from kalman_flax import compiler_options, merge_running
from kalman_flax.layers.linear import RNG
from train.data.batches import Crops, Split, augment, draw_crops
from train.engine.mesh import DEVICES, SAME, SPLIT, same

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
    def learned(self) -> dict[str, Any]:
        """The collections that move by their gradients."""
        return {"params": self.params, "gradient_stats": self.gradient_stats}

    @property
    def variables(self) -> dict[str, Any]:
        """The network's collections, as its `apply` takes them."""
        return self.learned | {"batch_stats": self.batch_stats}


def init_state(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: jax.Array | int,
    image_shape: tuple[int, ...],
) -> TrainState:
    """Initialises network and optimiser for images of `image_shape`, ``[H, W, C]``."""
    key = jax.random.key(seed)
    variables = network.init(
        {"params": key, RNG: key},
        jnp.zeros((1, *image_shape)),
        use_running_average=False,
    )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        gradient_stats=variables.get("gradient_stats", {}),
        opt_state=optimizer.init(variables["params"]),
    )


def create_state(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    image_shape: tuple[int, ...],
    mesh: Mesh,
) -> TrainState:
    """Returns `init_state`, the same on every device of `mesh`."""
    init = functools.partial(init_state, network, optimizer, seed, image_shape)
    return jax.jit(init, out_shardings=same(mesh))()


class Draws(NamedTuple):
    """The random numbers of one step.

    Drawn for the whole batch at once, and from seed and step alone: they are the same
    in a resumed run, and on any number of devices.

    Attributes:
        crops: of each example.
        keys: of each replica, ``[R]``, for the Monte Carlo transition.
    """

    crops: Crops
    keys: jax.Array


def draw(
    config: Any, seed: jax.Array | int, step: jax.Array | int, replicas: int
) -> Draws:
    """Draws the random numbers of update `step`, for ``config.batch_size`` examples."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    crop_key, replica_key = jax.random.split(key)
    return Draws(
        draw_crops(crop_key, config.batch_size, config.crop_padding, config.flip),
        jax.random.split(replica_key, replicas),
    )


def replicas_of(config: Any, mesh: Mesh) -> int:
    """Number of replicas in a step.

    With synchronised statistics a replica is all that a device runs at a time; it
    shares them with those of the other devices.
    """
    if config.sync_statistics:
        return config.accumulate * mesh.size
    return config.batch_size // config.micro_batch_size


def apply_replicas(
    network: nn.Module,
    variables: dict[str, Any],
    images: jax.Array,
    keys: jax.Array,
    mutable: Sequence[str] = ("batch_stats",),
) -> tuple[jax.Array, Any]:
    """Runs every micro-batch by its own statistics, as independent replicas.

    Args:
        network: maps images to logits.
        variables: the network's collections, the same for all replicas.
        images: ``[N, H, W, C]``, split evenly among the replicas.
        keys: one of each replica, ``[R]``, for the Monte Carlo transition.
        mutable: collections that the network may write.

    Returns:
        logits ``[N, num_classes]``, and the collections that each replica wrote, with a
        leading axis of replicas.
    """

    def forward(x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        return network.apply(
            variables,
            x,
            use_running_average=False,
            mutable=mutable,
            rngs={RNG: key},
        )

    logits, written = jax.vmap(forward)(split_evenly(images, len(keys)), keys)
    return logits.reshape(-1, logits.shape[-1]), written


def split_evenly(tree: Any, parts: int) -> Any:
    """Splits leaves ``[N, ...]`` into ``[parts, N / parts, ...]``."""
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), tree)


def loss_of(
    learned: dict[str, Any],
    network: nn.Module,
    standardize: Callable[[jax.Array], jax.Array],
    config: Any,
    state: TrainState,
    batch: Split,
    draws: Draws,
    mutable: Sequence[str] = ("batch_stats",),
) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """Returns what these examples add to the mean cross-entropy of the whole batch.

    And with it: this share and that of the accuracy, ``[2]``, and what `apply_replicas`
    says that the replicas wrote. `learned` takes the place of ``state.learned``.
    """
    images = standardize(augment(batch.images, draws.crops, config.crop_padding))
    logits, written = apply_replicas(
        network, state.variables | learned, images, draws.keys, mutable
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    correct = jnp.argmax(logits, -1) == batch.labels
    share = jnp.array([jnp.sum(loss), jnp.sum(correct)]) / config.batch_size
    return share[0], (share, written)


def make_update(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    standardize: Callable[[jax.Array], jax.Array],
    config: Any,
    mesh: Mesh,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the update ``(state, batch, seed=config.seed) -> (state, metrics)``.

    `batch` is split over the devices of `mesh`, `state` the same on all. A device runs
    its micro-batches as replicas, in ``config.accumulate`` parts one after the other.
    What it finds is its share of a sum over the batch, and so neither the loss, which
    is the mean cross-entropy per image, nor the gradient depends on the split. Only
    these sums and the running statistics cross devices.
    """
    replicas = replicas_of(config, mesh)

    def on_device(
        state: TrainState, batch: Split, draws: Draws
    ) -> tuple[jax.Array, Any, Any]:
        # Gradients of what is the same on all devices would be summed on the way, and
        # once more below.
        learned = lax.pcast(state.learned, DEVICES, to="varying")

        def gradient(learned: Any, given: tuple[Split, Draws]) -> tuple[Any, Any]:
            grads, (share, written) = jax.grad(loss_of, has_aux=True)(
                learned, network, standardize, config, state, *given
            )
            return grads, (share, written.get("batch_stats", {}))

        def part(total: Any, given: tuple[Split, Draws]) -> tuple[Any, Any]:
            # The barrier lets no part begin before the one in front of it has ended:
            # that is what saves memory.
            ready, total = lax.optimization_barrier((learned, total))
            grads, found = gradient(ready, given)
            return jax.tree.map(jnp.add, total, grads), found

        if config.accumulate == 1:  # no sum to begin at 0, and nothing to wait for
            grads, (share, written) = gradient(learned, (batch, draws))
        else:
            grads, (shares, written) = _in_turn(
                part,
                jax.tree.map(jnp.zeros_like, learned),
                split_evenly((batch, draws), config.accumulate),
            )
            written = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), written)
            share = jnp.sum(shares, axis=0)
        share, grads = lax.psum((share, grads), DEVICES)
        return share, grads, merge_running(written, config.stats_momentum, DEVICES)

    over_devices = jax.shard_map(
        on_device, mesh=mesh, in_specs=(SAME, SPLIT, SPLIT), out_specs=SAME
    )

    def update(
        state: TrainState, batch: Split, seed: jax.Array | int = config.seed
    ) -> tuple[TrainState, Metrics]:
        (loss, accuracy), grads, batch_stats = over_devices(
            state, batch, draw(config, seed, state.step, replicas)
        )
        # The sum over the replicas, each of which observed one.
        gradient_stats = jax.tree.map(lambda g: g / replicas, grads["gradient_stats"])
        grads = grads["params"]
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            gradient_stats=gradient_stats,
            opt_state=opt_state,
        )
        norm = optax.tree.norm(grads)
        return state, {"loss": loss, "accuracy": accuracy, "gradient_norm": norm}

    return update


def jit_update(update: Callable) -> Callable:
    """Jits ``update(state, ...)``, which takes over the state."""
    return jax.jit(update, donate_argnums=0, compiler_options=compiler_options())


def _in_turn(
    function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, given: Any
) -> tuple[Any, Any]:
    """`lax.scan`; on the CPU written out, where XLA takes some 20 times as long for the
    gradient of a convolution in a scan, even if that is unrolled."""
    parts = len(jax.tree.leaves(given)[0])
    if parts > 1 and jax.default_backend() != "cpu":
        return lax.scan(function, carry, given)
    results = []
    for i in range(parts):
        carry, result = function(carry, jax.tree.map(operator.itemgetter(i), given))
        results.append(result)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *results)
