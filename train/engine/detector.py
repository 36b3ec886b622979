"""A detector at work: canvases in, detections out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kalman_flax import compiler_options
from kalman_flax._filter.state import check_choice
from kalman_flax.layers.linear import RNG
from kalman_flax.models.detection.recipe import Detections
from kalman_flax.registry import DETECTORS
from train.data.batches import Standardize
from train.data.objects import Canvases, PictureSource
from train.engine import plugins
from train.engine.feed import batches_of
from train.engine.mesh import SPLIT, make_key, over_devices, same
from train.engine.normalizer import make_normalization, options_of
from train.engine.step import TrainState, apply_replicas

#: A, by moving statistics, and B, by those of each image
OPTIONS = ("moving", "batch")
#: options of a detector that other keys set
_SET_BY = {
    "num_classes": "the data set",
    "dtype": "the key dtype",
    "remat": "the key remat",
    "width": "the key width",
    "norm": "the key norm",
    "recipe": "each of its own",
}
#: attributes of a detector that are none of a user's
_NOT_SET = {*_SET_BY, "conv", "activation", "input_state", "parent", "name"}


def make_detector(config: Any, num_classes: int) -> nn.Module:
    """Builds the detector that `config` names, with the normaliser that it names.

    Args:
        config: of the run. Its `network_options` are attributes of the network, or of
            its `recipe`.
        num_classes: without the background.

    Raises:
        ValueError: there is no such detector, or no such option, or it cannot be so.
    """
    detectors = plugins.known(config, "DETECTORS", DETECTORS)
    check_choice("network", config.network, tuple(detectors))
    network = detectors[config.network](
        num_classes=num_classes,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        **({"width": config.width} if config.width else {}),
        **make_normalization(config)._asdict(),
    )
    options = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options_of(config, "network_options", _SET_BY).items()
    }
    settings = {field.name for field in dataclasses.fields(network.recipe)}
    own = {field.name for field in dataclasses.fields(network)} - _NOT_SET
    if unknown := sorted(options.keys() - settings - own):
        raise ValueError(
            f"network_options sets {unknown}; {config.network!r} has"
            f" {sorted(own | settings)}."
        )
    recipe = {name: options.pop(name) for name in settings & options.keys()}
    return network.clone(
        recipe=dataclasses.replace(network.recipe, **recipe), **options
    )


def prepare(
    canvases: Canvases[jax.Array], standardize: Standardize
) -> dict[str, jax.Array]:
    """Returns what a detector takes: standardised pixels, 0 outside of the images."""
    height, width = canvases.image.shape[1:3]
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
    size = canvases.size[:, :, None, None]
    valid = (rows < size[:, 0]) & (columns < size[:, 1])
    image = jnp.where(valid[..., None], standardize(canvases.image), 0.0)
    return {"image": image, "size": canvases.size}


def infer(network: nn.Module, variables: Any, inputs: Any) -> Detections:
    """Returns detections by the moving statistics (option A)."""
    # The Monte Carlo transition asks for a key; nothing here depends on it.
    rngs = {RNG: jax.random.key(0)}
    found: Any = network.apply(variables, inputs, use_running_average=True, rngs=rngs)
    return found


@dataclasses.dataclass(frozen=True)
class _CanvasesOf:
    """The images of a source without their objects, a `train.engine.task.Source`."""

    source: PictureSource

    @property
    def examples(self) -> int:
        return self.source.examples

    def read(
        self, index: np.ndarray, key: Sequence[int] | None = None
    ) -> Canvases[np.ndarray]:
        return self.source.read_canvases(index)


class Detector:
    """Finds what is on the images of a split, batch by batch."""

    def __init__(
        self,
        network: nn.Module,
        standardize: Standardize,
        config: Any,
        mesh: Mesh,
        options: Sequence[str] = OPTIONS,
    ):
        """Describes the search; it is compiled when first used.

        Args:
            network: the detector.
            standardize: what to do to the images first.
            config: of the run.
            mesh: its devices.
            options: of the paper, by which to normalise.
        """
        self._options = options
        self._network, self._standardize = network, standardize
        self._mesh, self._workers = mesh, config.data_workers
        self._size = max(1, config.eval_batch_size // mesh.size) * mesh.size
        self._key = make_key(mesh, config.seed)
        # Every process gets all, to make the same numbers of.
        self._compiled = jax.jit(
            over_devices(self._on_device, mesh, SPLIT),
            out_shardings=same(mesh),
            compiler_options=compiler_options(),
        )

    def __call__(
        self, state: TrainState, source: PictureSource
    ) -> Iterator[tuple[int, dict[str, Detections]]]:
        """Yields every example once, with what is found under both options."""
        batches = _batches(source.pictures.canvas, self._size)
        canvases = batches_of(
            self._mesh,
            _CanvasesOf(source),
            self._size,
            lambda number: batches[number % len(batches)][0],
            self._workers,
        )
        for number, (index, count) in enumerate(batches):
            keys = jax.random.split(jax.random.fold_in(self._key, number), self._size)
            found = self._compiled(state.variables, canvases(number), keys)
            found = jax.device_get(found)
            for row, example in enumerate(index[:count].tolist()):
                yield example, jax.tree.map(lambda x, row=row: x[row], found)

    def _on_device(
        self, variables: Any, canvases: Canvases[jax.Array], keys: jax.Array
    ) -> dict[str, Detections]:
        inputs = prepare(canvases, self._standardize)
        found = {}
        if "moving" in self._options:
            found["moving"] = infer(self._network, variables, inputs)
        if "batch" in self._options:
            own, _ = apply_replicas(self._network, variables, inputs, keys)
            found["batch"] = own
        return found


def _batches(canvas: np.ndarray, size: int) -> list[tuple[np.ndarray, int]]:
    """Splits examples into batches whose canvases are of one size.

    Args:
        canvas: of each example, ``[N, 2]``.
        size: examples a batch.

    Returns:
        The examples of each batch, ``[size]``, and how many of them count: the last of
        a kind is filled up.
    """
    batches = []
    for kind in np.unique(canvas, axis=0):
        members = np.flatnonzero((canvas == kind).all(1))
        for start in range(0, len(members), size):
            index = members[(start + np.arange(size)) % len(members)]
            batches.append((index, min(size, len(members) - start)))
    return batches
