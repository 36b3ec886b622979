"""How much of the bare training step's throughput the whole trainer reaches.

    python -m benchmarks.trainer --config=configs/experiments/cifar10_tiny.py \\
        --data_dir=DIR --workdir=runs/trainer

Trains as `python -m train` does, with its reading, logging and checkpoints, several
times over; and before and after each time the same step on one batch that is already
there: so that what slows the machine for a while slows both. The trainer's throughput
is that between the lines of its log, tests left out. Prints both, and the share that
the one is of the other time by time, and writes trainer.json.
"""

import pathlib

import numpy as np
from absl import flags
from ml_collections import config_flags

from train import cli
from train.analysis.speed import Stepper, between_lines, measure, quartiles, ratio
from train.engine import metrics
from train.engine import workdir as wd
from train.engine.experiment import build
from train.engine.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, a Python file.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "How often to train.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for trainer.json.")

#: bare steps, before and after each time
_STEPS = 10


def main() -> None:
    """Measures, prints and writes."""
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
    runs = [workdir / f"run{number}" for number in range(_ROUNDS.value)]
    if there := [str(run) for run in runs if run.exists()]:
        raise ValueError(f"{there} would not be trained again; choose another workdir.")
    experiment = build(config, cli.DATA_DIR.value)
    step = Stepper(experiment.train_step, experiment.state, experiment.batch(0))
    bare, whole = [], []
    for run in runs:
        seconds = measure({"step": step}, _STEPS)["step"]
        train(config, run, cli.DATA_DIR.value)
        seconds += measure({"step": step}, _STEPS)["step"]
        bare.append(config.batch_size / float(np.median(seconds)))
        lines = between_lines(metrics.read_metrics(run), config.batch_size)
        whole.append(float(np.median(lines)))
    found = {
        "bare_images_per_second": quartiles(bare),
        "trainer_images_per_second": quartiles(whole),
        "share": ratio(whole, bare),
    }
    wd.write_json(workdir / "trainer.json", wd.provenance() | found)
    print("median and quartiles over the rounds")
    for name, (middle, low, high) in found.items():
        print(f"{name.replace('_', ' ')}: {middle:.4g}, {low:.4g} to {high:.4g}")
    print(f"written: {workdir}/trainer.json")


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
