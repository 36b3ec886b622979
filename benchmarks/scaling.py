"""What crosses devices in a training step, and how steps scale with their number.

    python -m benchmarks.scaling --workdir=runs/scaling

Trains a ResNet-20 on the embedded digits, 16 images a device in micro-batches of 2, on
1, 2, 4, 8 CPU devices that share the cores of the machine. Counts the all-reduces of a
step and their bytes in the compiled program; these hold for any machine. Times the
steps, all sizes in turn: on shared cores the images per second can at best stay what
they are, and what is lost is the cost of splitting and of the all-reduces. Writes
scaling.json.
"""

import pathlib
import statistics
import time
from typing import Any

import jax
from absl import flags

from benchmarks.hlo import collectives
from configs.experiments import digits
from train import cli
from train.engine import workdir as wd
from train.engine.experiment import Experiment, build

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for scaling.json.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Timings of each.", lower_bound=1)

DEVICES = (1, 2, 4, 8)
VARIANTS = {
    "batch": {"norm": "batch"},
    "batch, synchronised": {"norm": "batch", "sync_statistics": True},
    "group": {"norm": "group"},
    "kalman": {"norm": "kalman"},
}
PER_DEVICE = 16


def make(variant: str, devices: int) -> tuple[Experiment, Any]:
    """Returns the experiment on so many devices, and its compiled step."""
    config = digits.get_config()
    config.update(
        blocks_per_stage=3,
        width=16,
        batch_size=PER_DEVICE * devices,
        micro_batch_size=2,
    )
    config.update(VARIANTS[variant])
    experiment = build(config, devices=jax.devices()[:devices])
    fixed = experiment.key, experiment.rates
    lowered = experiment.update.lower(experiment.state, experiment.batch(0), *fixed)
    return experiment, lowered.compile()


def main() -> None:
    """Measures, prints a table and writes the file."""
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    rows = []
    for variant in VARIANTS:
        made = {devices: make(variant, devices) for devices in DEVICES}
        states = {devices: made[devices][0].state for devices in DEVICES}
        seconds: dict[int, list[float]] = {devices: [] for devices in DEVICES}
        for number in range(_ROUNDS.value + 1):
            for devices, (experiment, step) in made.items():
                batch = jax.block_until_ready(experiment.batch(number))
                start = time.perf_counter()
                states[devices], _ = jax.block_until_ready(
                    step(states[devices], batch, experiment.key, experiment.rates)
                )
                if number:  # the first warms up
                    seconds[devices].append(time.perf_counter() - start)
        for devices, (experiment, step) in made.items():
            found = collectives(step.as_text())
            median = statistics.median(seconds[devices])
            rows.append(
                {
                    "variant": variant,
                    "devices": devices,
                    "collectives": len(found),
                    "bytes": sum(one.size for one in found),
                    "kinds": sorted({one.kind for one in found}),
                    "parameters": sum(
                        leaf.size for leaf in jax.tree.leaves(experiment.state.params)
                    ),
                    "median_seconds": median,
                    "images_per_second": devices * PER_DEVICE / median,
                    "seconds": seconds[devices],
                }
            )
            _print(rows[-1], first=len(rows) == 1)
    path = pathlib.Path(_WORKDIR.value)
    path.mkdir(parents=True, exist_ok=True)
    wd.write_json(path / "scaling.json", wd.provenance() | {"rows": rows})
    print(f"written: {path}/scaling.json")


def _print(row: dict[str, Any], first: bool) -> None:
    if first:
        print("variant               devices  all-reduces   KB  ms a step  images/s")
    print(
        f"{row['variant']:20}  {row['devices']:7}  {row['collectives']:11}"
        f"  {row['bytes'] / 1e3:5.0f}  {row['median_seconds'] * 1e3:9.1f}"
        f"  {row['images_per_second']:8.0f}",
        flush=True,
    )


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    flags.mark_flag_as_required("workdir")
    cli.run(main)
