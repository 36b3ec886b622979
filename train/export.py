"""Exports the last checkpoint of a run, to be used without this project.

    python -m train.export --workdir=runs/digits --output=exported

Inference is by moving statistics (option A). Writes

    network.stablehlo  the whole network, standardisation and weights included, for
                       `jax.export.deserialize`: any number of uint8 images, as the data
                       set has them, to logits, of a segmentation network to those of
                       every pixel; on CPUs, NVIDIA GPUs and TPUs
    variables.npz      for your own network in plain Flax: params and batch_stats by
                       path, kernels as they are used, and standardize/mean and scale
    metadata.json      inputs, outputs, class names, test numbers, config, versions

Of a detector there is a network_HxW.stablehlo for each kind of canvas, from images and
their sizes to boxes, scores, labels and masks. It needs the run, and not the data that
it was trained on: its test numbers are those that the run ended with.

The second is not written where there is nothing in Flax that it would fit: normalisers
that are neither batch norm nor group norm in inference. It is NumPy's own format, which
every version of everything reads.
"""

import pathlib
from typing import Any

import numpy as np
from absl import flags

from train import cli
from train.analysis import detections, programs
from train.engine import trained_on
from train.engine import workdir as wd
from train.engine.detection import Detection
from train.engine.experiment import build
from train.engine.settings import check, task_of
from train.engine.step import TrainState
from train.engine.task import Task

VARIABLES, METADATA = "variables.npz", "metadata.json"

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Directory to write, new or empty.", required=True
)


def main() -> None:
    """Restores, exports, tests and prints."""
    workdir, output = cli.path(_WORKDIR), cli.path(_OUTPUT)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; choose another --output.")
    config = wd.read_config(workdir)
    task, state = _restore(config, workdir)
    exported = programs.export(task, state.variables)
    plain, found = exported.plain, _numbers(workdir, task, state)
    metadata = {
        "run": str(workdir),
        "step": int(state.step),
        **exported.described,
        "test": found,
        "variables": plain and {"file": VARIABLES, "norm": plain.norm},
        "config": config.to_dict(),
        **wd.provenance(),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, serialized in exported.programs.items():
        (output / name).write_bytes(serialized)
    if plain:
        arrays: dict[str, Any] = {
            f"standardize/{key}": moment for key, moment in exported.standardize.items()
        }
        arrays |= plain.variables
        np.savez(output / VARIABLES, **arrays)
    wd.write_json(output / METADATA, metadata)
    headline = task.headline.removeprefix("moving_")
    shown = "test numbers unknown: the run has not ended"
    if found:
        number = format(found[headline], ".2%" if headline == "accuracy" else ".4f")
        shown = f"test {headline.replace('_', ' ')} {number}"
    print(f"step {metadata['step']}, {shown}")
    if not plain:
        print(
            f"no {VARIABLES}: in inference normaliser {config.norm!r} is neither"
            " batch norm nor group norm of Flax"
        )
    names = [*exported.programs, *([VARIABLES] if plain else []), METADATA]
    print(f"written: {output}/{', '.join(names)}")


def _restore(config: Any, workdir: pathlib.Path) -> tuple[Task, TrainState]:
    """The task of a run, and its last checkpoint."""
    check(config)
    if issubclass(task_of(config), Detection):
        return detections.restore(config, workdir)
    experiment = build(config, cli.DATA_DIR.value)
    return experiment.task, trained_on.last_state(workdir, experiment)


def _numbers(
    workdir: pathlib.Path, task: Task, state: TrainState
) -> dict[str, Any] | None:
    """How good it is by moving statistics, on how many images; None if nothing here
    says it."""
    if isinstance(task, Detection):
        summary = wd.read_summary(workdir)
        if summary is None or summary["steps"] != int(state.step):
            return None
        images, prefix, found = summary["test_images"], "test_moving_", summary
    else:
        images, prefix = task.test.examples, "moving_"
        found = task.evaluate(state, task.test)
    return {
        "images": images,
        **{
            name.removeprefix(prefix): value
            for name, value in found.items()
            if name.startswith(prefix)
        },
    }


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    cli.run(main)
