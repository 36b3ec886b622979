"""One parameter update, from micro-batches that share nothing."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh

from kalman_flax import compiler_options, merge_running
from kalman_flax.layers.linear import RNG
from train.engine.mesh import DEVICES, over_devices, same
from train.engine.task import Task

#: from the learning rate by step to the optimiser
MakeOptimizer = Callable[[optax.Schedule], optax.GradientTransformation]
Metrics = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
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


def create_state(
    task: Task, make_optimizer: MakeOptimizer, key: jax.Array, mesh: Mesh
) -> TrainState:
    """Initialises network and optimiser, the same on every device of `mesh`."""

    def init(key: jax.Array) -> TrainState:
        variables = task.network.init(
            {"params": key, RNG: key}, task.inputs(), use_running_average=False
        )
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            gradient_stats=variables.get("gradient_stats", {}),
            opt_state=make_optimizer(lambda step: 0.0).init(variables["params"]),
        )

    return jax.jit(init, out_shardings=same(mesh))(key)


class Draws(NamedTuple):
    """The random numbers of one step.

    Drawn for the whole batch at once, and from seed and step alone: they are the same
    in a resumed run, and on any number of devices.

    Attributes:
        examples: of each example, as the task draws them.
        keys: of each replica, ``[R]``, for the Monte Carlo transition.
    """

    examples: Any
    keys: jax.Array


def draw(task: Task, key: jax.Array, step: jax.Array | int, replicas: int) -> Draws:
    """Draws the random numbers of update `step` of the run whose key it is."""
    example_key, replica_key = jax.random.split(jax.random.fold_in(key, step))
    return Draws(task.draw(example_key), jax.random.split(replica_key, replicas))


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
    inputs: Any,
    keys: jax.Array,
    mutable: Sequence[str] = ("batch_stats",),
) -> tuple[Any, Any]:
    """Runs every micro-batch by its own statistics, as independent replicas.

    Args:
        network: called with `inputs`.
        variables: the network's collections, the same for all replicas.
        inputs: a pytree of arrays ``[N, ...]``, split evenly among the replicas.
        keys: one of each replica, ``[R]``, for the Monte Carlo transition.
        mutable: collections that the network may write.

    Returns:
        outputs, a pytree of arrays ``[N, ...]``, and the collections that each replica
        wrote, with a leading axis of replicas.
    """

    def forward(x: Any, key: jax.Array) -> tuple[Any, Any]:
        return network.apply(
            variables,
            x,
            use_running_average=False,
            mutable=mutable,
            rngs={RNG: key},
        )

    outputs, written = jax.vmap(forward)(split_evenly(inputs, len(keys)), keys)
    return join(outputs), written


def split_evenly(tree: Any, parts: int) -> Any:
    """Splits leaves ``[N, ...]`` into ``[parts, N / parts, ...]``."""
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), tree)


def join(tree: Any) -> Any:
    """Joins what `split_evenly` split."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


class Found(NamedTuple):
    """What comes of some examples of a batch.

    Attributes:
        share: what they add to the means over the whole batch, by name.
        written: by each replica, collections with a leading axis of those.
    """

    share: Metrics
    written: Any


def gradient_of(
    task: Task,
    config: Any,
    state: TrainState,
    learned: dict[str, Any],
    batch: Any,
    draws: Draws,
    **options: Any,
) -> tuple[dict[str, Any], Found]:
    """Returns the gradient of what these examples add to the mean loss of the batch.

    Args:
        task: whose loss.
        config: of the run.
        state: of the run.
        learned: where to take the gradient; takes the place of ``state.learned``.
        batch: some of the examples of a batch, whole micro-batches.
        draws: theirs.
        **options: ``network`` in place of the task's, ``mutable`` as of `Task.loss`.
    """
    network = options.pop("network", task.network)

    def loss(learned: dict[str, Any]) -> tuple[jax.Array, Found]:
        variables = state.variables | learned
        sums, written = task.loss(network, variables, batch, *draws, **options)
        share = jax.tree.map(lambda total: total / config.batch_size, sums)
        return share["loss"], Found(share, written)

    return jax.grad(loss, has_aux=True)(learned)


def varying(learned: dict[str, Any]) -> dict[str, Any]:
    """Lets every device have a gradient of its own, where that of what is the same on
    all would be summed over them on the way."""
    return lax.pcast(learned, DEVICES, to="varying")


def make_update(
    task: Task, make_optimizer: MakeOptimizer, config: Any, mesh: Mesh
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the update ``(state, batch, key, rates) -> (state, metrics)``.

    `batch` is split over the devices of `mesh`, all else the same on all. `key` is that
    of the run, `rates` its learning rates by step, ``[steps]``: as arguments, so that
    runs that differ in them are one program. A device runs its micro-batches as
    replicas, in ``config.accumulate`` parts one after the other. What it finds is its
    share of a sum over the batch, and so neither the loss, which is the mean per
    example, nor the gradient depends on the split. Only these sums and the running
    statistics cross devices.
    """
    replicas = replicas_of(config, mesh)
    on_device = functools.partial(_on_device, task, config)

    def update(
        state: TrainState, batch: Any, key: jax.Array, rates: jax.Array
    ) -> tuple[TrainState, Metrics]:
        draws = draw(task, key, state.step, replicas)
        share, grads, batch_stats = over_devices(on_device, mesh)(state, batch, draws)
        optimizer = make_optimizer(lambda step: rates[step])
        updates, opt_state = optimizer.update(
            grads["params"], state.opt_state, state.params
        )
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            # The sum over the replicas, each of which observed one.
            gradient_stats=jax.tree.map(
                lambda g: g / replicas, grads["gradient_stats"]
            ),
            opt_state=opt_state,
        )
        return state, share | {"gradient_norm": optax.tree.norm(grads["params"])}

    return update


def _on_device(
    task: Task, config: Any, state: TrainState, batch: Any, draws: Draws
) -> tuple[Metrics, dict[str, Any], Any]:
    """Returns means and gradients over the whole batch, and the running statistics,
    from the rows of it that lie on this device."""
    gradient = functools.partial(gradient_of, task, config, state)
    learned = varying(state.learned)
    if config.accumulate == 1:  # no sum to begin at 0, and nothing to wait for
        grads, found = gradient(learned, batch, draws)
    else:
        parts = split_evenly((batch, draws), config.accumulate)
        grads, found = _sum_in_turn(gradient, learned, parts)
    share, grads = lax.psum((found.share, grads), DEVICES)
    written = found.written.get("batch_stats", {})
    return share, grads, merge_running(written, config.stats_momentum, DEVICES)


def _sum_in_turn(
    gradient: Callable[..., tuple[Any, Found]], learned: Any, parts: Any
) -> tuple[Any, Found]:
    """Sums the gradients of parts, whose arrays have a leading axis, one after the
    other."""

    def add(total: Any, part: Any) -> tuple[Any, Found]:
        # The barrier lets no part begin before the one in front of it has ended: that
        # is what saves memory.
        ready, total = lax.optimization_barrier((learned, total))
        grads, found = gradient(ready, *part)
        return jax.tree.map(jnp.add, total, grads), found

    grads, found = in_turn(add, jax.tree.map(jnp.zeros_like, learned), parts)
    share = jax.tree.map(lambda shares: jnp.sum(shares, axis=0), found.share)
    return grads, Found(share, join(found.written))


def jit_update(update: Callable) -> Callable:
    """Jits ``update(state, ...)``, which takes over the state."""
    return jax.jit(update, donate_argnums=0, compiler_options=compiler_options())


def in_turn(
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
