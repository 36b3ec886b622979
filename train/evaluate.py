"""Tests the last checkpoint of a run, under both options of the paper and others.

    python -m train.evaluate --workdir=runs/digits
    python -m train.evaluate --workdir=runs/digits --split=train
    python -m train.evaluate --workdir=runs/digits --precise_batches=50 \\
        --example_weight=auto

Prints a line for each kind of statistics to normalise the images by. Option A: the
moving averages that training kept. Option B: those of each micro-batch of these images.
Two flags add lines, worth a try where micro-batches were small; neither changes the
weights or the checkpoint.

For up to 100 classes, confusion_test.csv and .png in the run say what is taken for
what: rows are the true classes, columns those predicted by option A.

Of a segmentation network it prints mIoU and Dice, and IoU and Dice of each class;
segments_test.csv and .png have the table, and predictions beside the truth.

Of a detector it prints COCO's twelve numbers, for boxes and for masks, a column for
each kind of statistics; option B are then those of each image.

Of a task of your own it prints all numbers of its `evaluate`;
`train.analysis.evaluation` says how it can print more.
"""

from absl import flags

from kalman_flax._filter.state import check_choice
from train import cli
from train.analysis.evaluation import Asked, report
from train.analysis.inference_statistics import AUTO, WEIGHTS, parse_weight
from train.engine import trained_on
from train.engine import workdir as wd
from train.engine.classification import Classification
from train.engine.experiment import build
from train.engine.task import splits

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_SPLIT = flags.DEFINE_string(
    "split",
    "test",
    "Images to evaluate on: train, those that the run trained on, as they are; or test,"
    " which also goes by the data set's name for it: ImageNet's validation, a folder's"
    " val.",
)
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
    weight = parse_weight(_EXAMPLE_WEIGHT.value)
    workdir, split = cli.path(_WORKDIR), _SPLIT.value
    config = wd.read_config(workdir)
    experiment = build(config, cli.DATA_DIR.value)
    if weight is not None and not isinstance(experiment.task, Classification):
        raise ValueError("--example_weight is for classification; leave it out.")
    sources = splits(experiment.task)
    check_choice("split", split, sources)
    asked = Asked(
        config,
        experiment,
        trained_on.last_state(workdir, experiment),
        sources[split],
        split,
        workdir,
        _PRECISE_BATCHES.value,
        weight,
    )
    asked.check()
    print(f"step {int(asked.state.step)}, {asked.source.examples} {split} images")
    report(experiment.task, asked)


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    cli.run(main)
