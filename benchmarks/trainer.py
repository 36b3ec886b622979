"""How much of the bare training step's throughput the whole trainer reaches.

    python -m benchmarks.trainer --config=configs/cifar10_tiny.py --data_dir=DIR \\
        --workdir=runs/trainer

Trains as `python -m train` does, with its reading, logging and checkpoints, and times
the same step on one batch that is already there, half before and half after: so that
what slows the machine for a while slows both. The trainer's throughput is that between
the lines of its log, tests left out. Prints both and writes trainer.json.
"""

import pathlib

import numpy as np
from absl import flags
from ml_collections import config_flags

from train import cli
from train import workdir as wd
from train.experiment import build
from train.loop import train
from train.speed import Stepper, between_lines, measure

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, a Python file.")
_ROUNDS = flags.DEFINE_integer("rounds", 40, "Bare steps to time.", lower_bound=2)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for trainer.json.")


def main() -> None:
    """Measures, prints and writes."""
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
    run = workdir / "run"
    if run.exists():
        raise ValueError(f"{run} is there already, and would not be trained again.")
    experiment = build(config, cli.DATA_DIR.value)
    step = Stepper(experiment.train_step, experiment.state, experiment.batch(0))
    seconds = measure({"step": step}, _ROUNDS.value // 2)["step"]
    train(config, run, cli.DATA_DIR.value)
    seconds += measure({"step": step}, _ROUNDS.value // 2)["step"]
    bare = config.batch_size / np.array(seconds)
    whole = between_lines(wd.read_metrics(run), config.batch_size)
    found = {
        "bare_images_per_second": np.quantile(bare, (0.5, 0.25, 0.75)).tolist(),
        "trainer_images_per_second": np.quantile(whole, (0.5, 0.25, 0.75)).tolist(),
        "share": float(np.median(whole) / np.median(bare)),
    }
    wd.write_json(workdir / "trainer.json", wd.provenance() | found)
    for name, middle, low, high in (
        ("bare step", *found["bare_images_per_second"]),
        ("trainer", *found["trainer_images_per_second"]),
    ):
        print(f"{name}: {middle:.0f} images/s, quartiles {low:.0f} to {high:.0f}")
    print(f"share: {found['share']:.3f}\nwritten: {workdir}/trainer.json")


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
