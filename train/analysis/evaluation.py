"""What `train.evaluate` says of a run, by its task.

Of a task of your own it prints the numbers of `Task.evaluate`. One that has more to
show registers a `report`, in its own module::

    @evaluation.report.register
    def _(task: MyTask, asked: evaluation.Asked) -> None: ...
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from kalman_flax.inference.precise import running_moments
from train.analysis import confusion, segments
from train.analysis.coco_table import by_option, coco_table
from train.analysis.inference_statistics import AUTO, choose_weight, recompute
from train.engine.classification import Classification
from train.engine.detection import Detection
from train.engine.experiment import Experiment
from train.engine.segmentation import Segmentation
from train.engine.step import TrainState


class Asked(NamedTuple):
    """What is to be said of a run.

    Attributes:
        config, experiment: of the run.
        state: its last.
        source: the examples, of the task's kind.
        split: what these are called.
        workdir: where files go.
        batches: training batches to find precise statistics on; None: without these.
        weight: of an image's own statistics, for `Classification`; None: without.
    """

    config: Any
    experiment: Experiment
    state: TrainState
    source: Any
    split: str
    workdir: pathlib.Path
    batches: int | None = None
    weight: float | Literal["auto"] | None = None

    def check(self) -> None:
        """Refuses to find other statistics where the normaliser keeps none.

        Raises:
            ValueError: it is so.
        """
        more = self.batches is not None or self.weight is not None
        if more and not running_moments(self.state.batch_stats):
            raise ValueError(
                f"normaliser {self.config.norm!r} keeps no moving mean and variance;"
                " leave out --precise_batches and --example_weight."
            )

    def states(self) -> Iterator[tuple[str, TrainState]]:
        """Yields the state by its moving statistics, and then by precise ones, each
        with what to call them."""
        yield "moving statistics", self.state
        if self.batches is not None:
            name = f"precise statistics of {self.batches} training batches"
            args = self.config, self.experiment, self.state, self.batches
            yield name, recompute(*args)


@functools.singledispatch
def report(task: Any, asked: Asked) -> None:
    """Prints what the network of a task comes to, under each kind of statistics."""
    for name, state in asked.states():
        print(f"{name}:")
        for key, number in task.evaluate(state, asked.source).items():
            print(f"  {number:8.4f}  {key}", flush=True)


@report.register
def _(task: Classification, asked: Asked) -> None:
    """A line for each kind of statistics, and what is taken for what."""
    titled = False
    for name, state in asked.states():
        found = task.evaluate(state, asked.source)
        if not titled:
            top5 = "    top-5" if "moving_top5_accuracy" in found else ""
            print(f"accuracy{top5}     loss  normalised by")
        _show(found, "moving", f"A, {name}")
        if not titled:
            _show(found, "batch", "B, micro-batch statistics")
        if asked.weight is not None:
            weight, how = asked.weight, ""
            if weight == AUTO:
                weight = choose_weight(asked.experiment, state)
                how = ", best on training images"
            found = task.evaluate(state, asked.source, weight)
            name = f"A, {name}, image's own at weight {weight:g}{how}"
            _show(found, "weighed", name)
        titled = True
    _confuse(task, asked)


def _show(found: Mapping[str, float], kind: str, name: str) -> None:
    columns = [f"{found[f'{kind}_accuracy']:8.2%}"]
    if (top5 := found.get(f"{kind}_top5_accuracy")) is not None:
        columns.append(f"{top5:7.2%}")
    columns += [f"{found[f'{kind}_loss']:7.4f}", name]
    print("  ".join(columns), flush=True)


def _confuse(task: Classification, asked: Asked) -> None:
    """Writes the confusion matrix, as CSV and as a picture."""
    names = task.dataset.classes
    if len(names) > confusion.MOST_CLASSES:
        print(
            f"no confusion matrix: there are {len(names)} classes, more than"
            f" {confusion.MOST_CLASSES}"
        )
        return
    counts, examples = task.confusion(asked.state, asked.source), asked.source.examples
    title = f"{examples} images, {counts.trace() / examples:.2%} right"
    to = asked.workdir / f"confusion_{asked.split}"
    confusion.write_csv(to.with_suffix(".csv"), counts, names)
    confusion.plot(to.with_suffix(".png"), counts, names, title)
    print(f"written: {to}.csv, .png")


@report.register
def _(task: Segmentation, asked: Asked) -> None:
    """The same, and the numbers of each class."""
    (_, state), *others = asked.states()
    precise = {f"A, {name}": other for name, other in others}
    print(segments.numbers(task, state, asked.source, precise))
    to = asked.workdir / f"segments_{asked.split}"
    print(segments.by_class(task, state, asked.source, to))
    print(f"written: {to}.csv, .png")


@report.register
def _(task: Detection, asked: Asked) -> None:
    """COCO's numbers, a column for each kind of statistics."""
    columns, note = {}, "A: moving statistics; B: statistics of each image"
    for name, state in asked.states():
        found = task.evaluate(state, asked.source)
        if not columns:
            columns = {"A": by_option(found, "moving"), "B": by_option(found, "batch")}
        else:
            columns["P"] = by_option(found, "moving")
            note += f"; P: {name}"
    print(coco_table(columns))
    print(note)
