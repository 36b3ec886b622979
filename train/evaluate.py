"""Tests the last checkpoint of a run, under both options of the paper and others.

    python -m train.evaluate --workdir=runs/digits
    python -m train.evaluate --workdir=runs/digits --precise_batches=50 \\
        --example_weight=auto

Prints a line for each kind of statistics to normalise the test images by. Option A: the
moving averages that training kept. Option B: those of each micro-batch of test images.
Two flags add lines, worth a try where micro-batches were small; neither changes the
weights or the checkpoint.
"""

import pathlib

from absl import flags

from kalman_flax.baselines.precise import running_moments
from train import cli
from train import workdir as wd
from train.experiment import build
from train.inference import AUTO, WEIGHTS, choose_weight, parse_weight, recompute
from train.step import TrainState

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_PRECISE_BATCHES = flags.DEFINE_integer(
    "precise_batches",
    None,
    "Also test with precise statistics in place of the moving ones: recomputed from so"
    " many training batches by the final weights.",
    lower_bound=1,
)
_EXAMPLE_WEIGHT = flags.DEFINE_string(
    "example_weight",
    None,
    "Also test with each image's own statistics mixed into the moving ones, at this"
    f" weight: a number from 0 to 1, or {AUTO}: of {', '.join(map(str, WEIGHTS))} the"
    " one with the smallest loss on training images.",
)


def main() -> None:
    """Restores, evaluates and prints."""
    weight, batches = parse_weight(_EXAMPLE_WEIGHT.value), _PRECISE_BATCHES.value
    workdir = pathlib.Path(_WORKDIR.value)
    config = wd.read_config(workdir)
    experiment = build(config, cli.DATA_DIR.value)
    state = wd.last_checkpoint(workdir, experiment.state)
    if (batches or weight is not None) and not running_moments(state.batch_stats):
        raise ValueError(
            f"normaliser {config.norm!r} keeps no moving mean and variance; leave out"
            " --precise_batches and --example_weight."
        )

    def show(result: dict[str, float], kind: str, name: str) -> None:
        accuracy, loss = result[f"{kind}_accuracy"], result[f"{kind}_loss"]
        print(f"{accuracy:8.2%}  {loss:7.4f}  {name}", flush=True)

    def show_weighed(state: TrainState, name: str) -> None:
        chosen = choose_weight(experiment, state) if weight == AUTO else weight
        result = experiment.evaluate(state, experiment.test, chosen)
        how = ", best on training images" if weight == AUTO else ""
        show(result, "weighed", f"{name}, image's own at weight {chosen:g}{how}")

    print(f"step {int(state.step)}, {experiment.test.examples} test images")
    print("accuracy     loss  normalised by")
    result = experiment.evaluate(state, experiment.test)
    name = "A, moving statistics"
    show(result, "moving", name)
    show(result, "batch", "B, micro-batch statistics")
    if weight is not None:
        show_weighed(state, name)
    if batches:
        state = recompute(config, experiment, state, batches)
        name = f"A, precise statistics of {batches} training batches"
        show(experiment.evaluate(state, experiment.test), "moving", name)
        if weight is not None:
            show_weighed(state, name)


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    flags.mark_flag_as_required("workdir")
    cli.run(main)
