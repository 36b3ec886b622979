"""The devices of a run: one axis, over which the examples of a batch are split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

#: the axis of the mesh; what lies along it differs from device to device
DEVICES = "devices"
SPLIT = PartitionSpec(DEVICES)
SAME = PartitionSpec()

#: of `jax.Device`, which is no class to a type checker
Devices = Sequence[Any]


def make_mesh(replicas: int, devices: Devices | None = None) -> Mesh:
    """Returns a mesh over as many devices as the replicas of a step split evenly into.

    Args:
        replicas: micro-batches of one step that could run side by side.
        devices: those to use; by default all of all processes.

    Raises:
        ValueError: several processes, and one would be left without work.
    """
    devices = list(jax.devices() if devices is None else devices)
    used = math.gcd(len(devices), replicas)
    if used < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"{replicas} micro-batches a step do not split evenly over the"
            f" {len(devices)} devices of {jax.process_count()} processes; choose"
            " batch_size = micro_batch_size x accumulate x a multiple of the devices."
        )
    return Mesh(np.array(devices[:used]), (DEVICES,), axis_types=(AxisType.Auto,))


def same(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, SAME)


def make_key(mesh: Mesh, seed: int) -> jax.Array:
    """Returns the key of a seed below 2^32, on every device. All random numbers of a
    run on devices come from it."""
    return jax.jit(jax.random.key, out_shardings=same(mesh))(np.uint32(seed))


def over_devices(
    function: Callable[..., Any], mesh: Mesh, out: PartitionSpec = SAME
) -> Callable[..., Any]:
    """Returns `function`, run by every device on its rows.

    Args:
        function: its first argument every device gets whole, of the others the rows
            that lie on it. Between them it reduces over `DEVICES` itself.
        mesh: the devices.
        out: what it returns: `SAME`, the same on all, or `SPLIT`, rows.
    """

    def run(whole: Any, *split: Any) -> Any:
        specs = (SAME, *[SPLIT] * len(split))
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out)(
            whole, *split
        )

    return run


def local_rows(mesh: Mesh, examples: int) -> np.ndarray:
    """Returns which rows of a batch lie on devices of this process, ``[N]`` bool."""
    mine = np.zeros(examples, bool)
    places = NamedSharding(mesh, SPLIT).addressable_devices_indices_map((examples,))
    for at in places.values():
        mine[at] = True
    return mine


def take(mesh: Mesh, arrays: Any, index: np.ndarray) -> Any:
    """Returns the rows `index` of a pytree of host arrays, split over the devices in
    this order.

    A process reads the rows of its own devices and no others.
    """

    def rows(array: np.ndarray) -> jax.Array:
        def part(at: Any) -> np.ndarray:
            return array[index[at[0]]]

        shape = (len(index), *array.shape[1:])
        return jax.make_array_from_callback(shape, NamedSharding(mesh, SPLIT), part)

    return jax.tree.map(rows, arrays)
