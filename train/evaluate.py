"""Tests the last checkpoint of a run, under both options of the paper.

    python -m train.evaluate --workdir=runs/digits

Option A normalises by the moving statistics, option B by those of each micro-batch.
"""

import pathlib

from absl import flags

from train import cli
from train import workdir as wd
from train.experiment import build

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")


def main() -> None:
    """Restores, evaluates and prints."""
    workdir = pathlib.Path(_WORKDIR.value)
    experiment = build(wd.read_config(workdir), cli.DATA_DIR.value)
    with wd.open_checkpoints(workdir) as checkpoints:
        if checkpoints.latest_step() is None:
            raise FileNotFoundError(f"no checkpoint in {workdir}; train for longer.")
        state = wd.restore(checkpoints, experiment.state)
    result = experiment.evaluate(state, experiment.test)
    print(f"step {int(state.step)}, {len(experiment.test.labels)} test images")
    print(
        f"accuracy  A, moving statistics: {result['moving_accuracy']:.2%}"
        f"  B, micro-batch statistics: {result['batch_accuracy']:.2%}"
    )
    print(
        f"loss      A: {result['moving_loss']:.4f}  B: {result['batch_loss']:.4f}",
    )


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    flags.mark_flag_as_required("workdir")
    cli.run(main)
