"""Trains one network; run it again to go on after an interruption.

    python -m train --config=configs/experiments/digits.py --workdir=runs/digits

Any key of the config can be set: --config.micro_batch_size=4 --config.norm=batch, also
nested options: --config.norm_options.gain=0.1. docs/config.md explains the keys.
"""

from absl import flags

from train import cli
from train.engine import processes
from train.engine.loop import train
from train.studies.report import describe

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of this run.", required=True)


def main() -> None:
    """Trains and prints the summary."""
    with processes.joined():
        summary = train(_CONFIG.value, cli.path(_WORKDIR), cli.DATA_DIR.value)
        if processes.primary():
            print(describe(summary))


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    flags.adopt_module_key_flags(processes)
    flags.mark_flag_as_required("config")
    cli.run(main)
