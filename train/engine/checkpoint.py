"""What a run may start from: another run, an export of one, published weights."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kalman_flax import Normalization, read_pretrained
from kalman_flax.baselines.flax_norms import BatchNorm
from train.engine import workdir as wd
from train.engine.files import directory, read_json
from train.engine.mesh import same
from train.engine.normalizer import make_normalization
from train.engine.optimizer import make_optimizer
from train.engine.step import TrainState

Path = tuple[str, ...]

#: collections that are read; what was observed of gradients is not
COLLECTIONS = ("params", "batch_stats")


class Checkpoint(NamedTuple):
    """What there is to start from.

    Attributes:
        name: what to call it.
        variables: parameters and running statistics, by path.
        norm: what its normaliser is called.
        layers: what its norms, convolutions and activations compute.
        config: of the run that it comes from, if that is known.
    """

    name: str
    variables: dict[Path, Any]
    norm: str
    layers: Normalization
    config: ConfigDict | None = None


def read(path: str, mesh: Mesh) -> Checkpoint:
    """Reads the workdir of a run, a ``variables.npz`` of `train.export`, or published
    weights, see `kalman_flax.read_pretrained`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is something else.
    """
    place = existing(path)
    if place.is_dir():
        return _of_workdir(place, mesh)
    if place.suffix == ".npz":
        with np.load(place) as file:
            arrays = dict(file)
        if any(name.startswith("params/") for name in arrays):
            return _exported(place, arrays)
    variables = traverse_util.flatten_dict(read_pretrained(place))
    return Checkpoint(str(place), variables, "batch", Normalization(BatchNorm))


def existing(path: str) -> pathlib.Path:
    """Returns the file or directory that ``init_from`` names.

    Raises:
        FileNotFoundError: there is none.
    """
    place = directory(path, "init_from")
    if not place.exists():
        raise FileNotFoundError(
            f"init_from is {path}, which is not there; expected the workdir of a run, a"
            " variables.npz of train.export, or a .safetensors."
        )
    return place


def _of_workdir(workdir: pathlib.Path, mesh: Mesh) -> Checkpoint:
    config = wd.read_config(workdir)
    saved = wd.saved_shapes(workdir)

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=same(mesh)), tree
        )

    # The optimiser's state too, as a checksum over all of it tells damage.
    params = placed(saved["params"])
    optimizer = make_optimizer(config, lambda step: 0.0)
    state = wd.last_checkpoint(
        workdir,
        TrainState(
            step=placed(saved["step"]),
            params=params,
            batch_stats=placed(saved.get("batch_stats") or {}),
            gradient_stats=placed(saved.get("gradient_stats") or {}),
            opt_state=placed(jax.eval_shape(optimizer.init, params)),
        ),
    )
    variables = {name: getattr(state, name) for name in COLLECTIONS}
    return Checkpoint(
        f"{workdir}, step {int(state.step)}",
        traverse_util.flatten_dict(variables),
        config.norm,
        make_normalization(config),
        config,
    )


def _exported(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> Checkpoint:
    """Kernels are stored as they are used, whatever the run did to its own."""
    variables = {tuple(name.split("/")): array for name, array in arrays.items()}
    variables = {p: a for p, a in variables.items() if p[0] in COLLECTIONS}
    about = path.with_name("metadata.json")
    if about.exists():
        content = read_json(about, "export the run again")
        config = wd.parse_config(content["config"])
        layers = Normalization(make_normalization(config).norm)
        return Checkpoint(str(path), variables, config.norm, layers, config)
    if not any(p[0] == "batch_stats" for p in variables):
        raise ValueError(
            f"there is no {about.name} beside {path}, which says how the network"
            " normalises; put it back, or export the run again."
        )
    return Checkpoint(str(path), variables, "batch", Normalization(BatchNorm))
