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
"""

import pathlib

from absl import flags

from kalman_flax._filter.state import check_choice
from kalman_flax.inference.precise import running_moments
from train import cli
from train.analysis import confusion, segments
from train.analysis.coco_table import by_option, coco_table
from train.analysis.inference_statistics import (
    AUTO,
    WEIGHTS,
    choose_weight,
    parse_weight,
    recompute,
)
from train.engine import trained_on
from train.engine import workdir as wd
from train.engine.classification import Classification, Images
from train.engine.detection import Detection
from train.engine.experiment import Experiment, build
from train.engine.segmentation import Segmentation
from train.engine.step import TrainState
from train.engine.task import of_kind

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
    weight, batches = parse_weight(_EXAMPLE_WEIGHT.value), _PRECISE_BATCHES.value
    workdir = cli.path(_WORKDIR)
    config = wd.read_config(workdir)
    experiment = build(config, cli.DATA_DIR.value)
    if isinstance(experiment.task, Segmentation):
        return _evaluate_segmentation(experiment, workdir)
    if isinstance(experiment.task, Detection):
        return _evaluate_detection(experiment, workdir)
    task = of_kind(experiment.task, Classification)
    check_choice("split", _SPLIT.value, task.splits)
    split = task.splits[_SPLIT.value]
    last = state = trained_on.last_state(workdir, experiment)
    if (batches or weight is not None) and not running_moments(state.batch_stats):
        raise ValueError(
            f"normaliser {config.norm!r} keeps no moving mean and variance; leave out"
            " --precise_batches and --example_weight."
        )

    def show(result: dict[str, float], kind: str, name: str) -> None:
        columns = [f"{result[f'{kind}_accuracy']:8.2%}"]
        if (top5 := result.get(f"{kind}_top5_accuracy")) is not None:
            columns.append(f"{top5:7.2%}")
        columns += [f"{result[f'{kind}_loss']:7.4f}", name]
        print("  ".join(columns), flush=True)

    def show_weighed(state: TrainState, name: str) -> None:
        chosen = choose_weight(experiment, state) if weight == AUTO else weight
        result = task.evaluate(state, split, chosen)
        how = ", best on training images" if weight == AUTO else ""
        show(result, "weighed", f"{name}, image's own at weight {chosen:g}{how}")

    result = task.evaluate(state, split)
    print(f"step {int(state.step)}, {split.examples} {_SPLIT.value} images")
    top5 = "    top-5" if "moving_top5_accuracy" in result else ""
    print(f"accuracy{top5}     loss  normalised by")
    name = "A, moving statistics"
    show(result, "moving", name)
    show(result, "batch", "B, micro-batch statistics")
    if weight is not None:
        show_weighed(state, name)
    if batches:
        state = recompute(config, experiment, state, batches)
        name = f"A, precise statistics of {batches} training batches"
        show(task.evaluate(state, split), "moving", name)
        if weight is not None:
            show_weighed(state, name)
    _confuse(task, last, split, workdir / f"confusion_{_SPLIT.value}")


def _evaluate_segmentation(experiment: Experiment, workdir: pathlib.Path) -> None:
    """The same for a segmentation network."""
    task, batches = of_kind(experiment.task, Segmentation), _PRECISE_BATCHES.value
    if _EXAMPLE_WEIGHT.value is not None:
        raise ValueError("--example_weight is for classification; leave it out.")
    check_choice("split", _SPLIT.value, task.splits)
    split = task.splits[_SPLIT.value]
    state = trained_on.last_state(workdir, experiment)
    others = {}
    if batches:
        name = f"A, precise statistics of {batches} training batches"
        others[name] = recompute(task.config, experiment, state, batches)
    print(f"step {int(state.step)}, {split.examples} {_SPLIT.value} images")
    print(segments.numbers(task, state, split, others))
    to = workdir / f"segments_{_SPLIT.value}"
    print(segments.by_class(task, state, split, to))
    print(f"written: {to}.csv, .png")


def _evaluate_detection(experiment: Experiment, workdir: pathlib.Path) -> None:
    """The same for a detector."""
    task, batches = of_kind(experiment.task, Detection), _PRECISE_BATCHES.value
    if _EXAMPLE_WEIGHT.value is not None:
        raise ValueError("--example_weight is for classification; leave it out.")
    check_choice("split", _SPLIT.value, task.splits)
    split = task.splits[_SPLIT.value]
    state = trained_on.last_state(workdir, experiment)
    found = task.evaluate(state, split)
    columns = {"A": by_option(found, "moving"), "B": by_option(found, "batch")}
    note = "A: moving statistics; B: statistics of each image"
    if batches:
        state = recompute(task.config, experiment, state, batches)
        columns["P"] = by_option(task.evaluate(state, split), "moving")
        note += f"; P: precise statistics of {batches} training batches"
    print(f"step {int(state.step)}, {split.examples} {_SPLIT.value} images")
    print(coco_table(columns))
    print(note)


def _confuse(
    task: Classification, state: TrainState, split: Images, to: pathlib.Path
) -> None:
    """Writes the confusion matrix as `to` .csv and .png."""
    names = task.dataset.classes
    if len(names) > confusion.MOST_CLASSES:
        print(
            f"no confusion matrix: there are {len(names)} classes, more than"
            f" {confusion.MOST_CLASSES}"
        )
        return
    counts = task.confusion(state, split)
    title = f"{split.examples} images, {counts.trace() / split.examples:.2%} right"
    confusion.write_csv(to.with_suffix(".csv"), counts, names)
    confusion.plot(to.with_suffix(".png"), counts, names, title)
    print(f"written: {to}.csv, .png")


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    cli.run(main)
