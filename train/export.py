"""Exports the last checkpoint of a run, to be used without this project.

    python -m train.export --workdir=runs/digits --output=exported

Inference is by moving statistics (option A). Writes

    network.stablehlo  the whole network, standardisation and weights included, for
                       `jax.export.deserialize`: any number of uint8 images, as the data
                       set has them, to logits; on CPUs, NVIDIA GPUs and TPUs
    variables.npz      for your own network in plain Flax: params and batch_stats by
                       path, kernels as they are used, and standardize/mean and scale
    metadata.json      inputs, outputs, class names, test accuracy, config, versions

The second is not written where there is nothing in Flax that it would fit: normalisers
that are neither batch norm nor group norm in inference. It is NumPy's own format, which
every version of everything reads.
"""

from typing import Any

import numpy as np
from absl import flags

from train import cli
from train.analysis import stablehlo as artifact
from train.data.encoded import Encoded
from train.engine import trained_on
from train.engine import workdir as wd
from train.engine.classification import Classification
from train.engine.experiment import build
from train.engine.step import TrainState
from train.engine.task import of_kind

NETWORK, VARIABLES, METADATA = "network.stablehlo", "variables.npz", "metadata.json"
#: test images on which plain Flax is to give the same logits
TRIED = 8

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write, new or empty.")


def main() -> None:
    """Restores, exports, tests and prints."""
    workdir, output = cli.path(_WORKDIR), cli.path(_OUTPUT)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; choose another --output.")
    config = wd.read_config(workdir)
    experiment = build(config, cli.DATA_DIR.value)
    state = trained_on.last_state(workdir, experiment)
    task = of_kind(experiment.task, Classification)
    network, variables = task.network, state.variables
    standardize, test = task.standardize, task.test
    images = standardize(test.read(np.arange(TRIED) % test.examples).images)
    plain = artifact.plain_variables(network, variables, images)
    serialized = artifact.serialize(network, variables, standardize, test.image_shape)
    metadata = {
        "run": str(workdir),
        **_describe(task, state),
        "variables": plain and {"file": VARIABLES, "norm": plain.norm},
        "config": config.to_dict(),
        **wd.provenance(),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / NETWORK).write_bytes(serialized)
    if plain:
        first = {f"standardize/{k}": v for k, v in standardize._asdict().items()}
        np.savez(output / VARIABLES, **first, **plain.variables)
    wd.write_json(output / METADATA, metadata)
    print(f"step {metadata['step']}, test accuracy {metadata['test']['accuracy']:.2%}")
    if not plain:
        print(
            f"no {VARIABLES}: in inference normaliser {config.norm!r} is neither batch"
            " norm nor group norm of Flax"
        )
    names = [NETWORK, *([VARIABLES] if plain else []), METADATA]
    print(f"written: {output}/{', '.join(names)}")


def _describe(task: Classification, state: TrainState) -> dict[str, Any]:
    """What goes in, what comes out, and how good it is."""
    test = task.test
    found = task.evaluate(state, test)
    preparation = "pixels as the data set has them; the network standardises them"
    if isinstance(test, Encoded):
        preparation += (
            "; RGB, of the shorter side the central 224/256, resized with antialiasing"
        )
    return {
        "step": int(state.step),
        "network": {"file": NETWORK, "platforms": artifact.PLATFORMS},
        "input": {
            "shape": ["batch", *test.image_shape],
            "dtype": "uint8",
            "preparation": preparation,
        },
        "output": {
            "shape": ["batch", task.network.num_classes],
            "dtype": "float32",
            "meaning": "logits; their softmax are the probabilities of the classes",
        },
        "classes": task.dataset.classes,
        "test": {
            "images": test.examples,
            **{
                name.removeprefix("moving_"): value
                for name, value in found.items()
                if name.startswith("moving_")
            },
        },
    }


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    flags.mark_flags_as_required(["workdir", "output"])
    cli.run(main)
