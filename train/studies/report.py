"""Tables from the summaries of runs."""

from __future__ import annotations

import decimal
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

#: what a run is; in a table of runs its metrics stand between these and `COSTS`
KEYS = (
    "variant",
    "norm",
    "batch_size",
    "micro_batch_size",
    "learning_rate",
    "devices",
    "seed",
)
COSTS = ("final_train_loss", "parameters", "steps", "seconds")
#: columns of a CSV that are whole numbers, also where some are missing
WHOLE = ("batch_size", "micro_batch_size", "devices", "seed", "parameters", "steps")
#: the metric to compare runs by, a share of 1, where the summary names no other
HEADLINE = "test_moving_accuracy"


class Run(NamedTuple):
    """A run's summary, and its metrics by step."""

    summary: dict[str, Any]
    metrics: list[dict[str, float]]

    @property
    def diverged(self) -> bool:
        """Whether training stopped at a NaN or infinity."""
        return self.summary.get("diverged", False)

    @property
    def headline(self) -> str:
        """The metric to compare it by, under the moving statistics."""
        return self.summary.get("headline") or HEADLINE

    def row(self) -> dict[str, Any]:
        """Returns the summary's columns of the table; None where there is none."""
        named = ("headline",) if "headline" in self.summary else ()
        validation = validation_of(self.headline)
        if validation in self.summary:
            named += (validation,)
        columns = (*KEYS, *named, *options(self.headline), *COSTS)
        return {column: self.summary.get(column) for column in columns}


def validation_of(headline: str) -> str:
    """Returns the same metric on the images kept back to choose settings by."""
    return headline.replace("test_", "validation_", 1)


def options(headline: str) -> list[str]:
    """Returns the metric under options A and B, or alone where it has no options."""
    return list(dict.fromkeys((headline, headline.replace("moving", "batch"))))


def metric_name(headline: str) -> str:
    """Returns what people call the metric: "test accuracy"."""
    return headline.replace("moving_", "").replace("_", " ")


def headline_of(runs: Sequence[Run]) -> str:
    """Returns the metric that all of the runs are compared by.

    Raises:
        ValueError: they are of tasks that have different ones.
    """
    names = {run.headline for run in runs if not run.diverged}
    if len(names) > 1:
        raise ValueError(
            f"the runs are compared by different metrics, {sorted(names)}: make a table"
            " of each task."
        )
    return names.pop() if names else HEADLINE


def describe(summary: dict[str, Any]) -> str:
    """Returns what a single run came to: two lines, and one on the predictions of
    Kalman normalisers."""
    seconds = max(summary["seconds"], 0.1)  # it is rounded to tenths
    images = summary["steps"] * summary["batch_size"] / seconds
    name = Run(summary, []).headline
    found = [_shown(summary, option) for option in options(name) if option in summary]
    labels = ("A, moving statistics: ", "B, micro-batch statistics: ")
    if len(found) == 1:
        labels = ("",)
    return (
        f"{summary['norm']}: batch {summary['batch_size']}, micro-batch"
        f" {summary['micro_batch_size']}, {summary['devices']} device(s),"
        f" {summary['steps']} steps in {summary['seconds']:.0f} s with tests and"
        f" checkpoints, {images:.0f} examples/s\n"
        f"{metric_name(name)} on {summary['test_images']} examples  "
        + "  ".join(label + text for label, text in zip(labels, found))
        + _predicted(summary)
    )


def _predicted(summary: dict[str, Any]) -> str:
    # Not there for other normalisers, and in runs from before it was counted.
    if "predicted" not in summary:
        return ""
    return "\n{} of {} normalisers predicted".format(*summary["predicted"])


def _shown(summary: dict[str, Any], metric: str) -> str:
    value = format(summary[metric], form(metric)[2:-1])
    # Not there for few classes, and in runs from before it was counted.
    top5 = summary.get(metric.replace("accuracy", "top5_accuracy"))
    return value if top5 in (None, summary[metric]) else f"{value} (top-5 {top5:.2%})"


def form(metric: str) -> str:
    """Returns how a metric is printed, for `str.format`: accuracies in %."""
    return "{:.2%}" if "accuracy" in metric else "{:.4g}"


def groups(runs: Sequence[Run]) -> dict[tuple[str, int], list[Run]]:
    """Groups runs that differ in the seed alone, by variant and micro-batch size."""
    result: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        key = run.summary["variant"], run.summary["micro_batch_size"]
        result.setdefault(key, []).append(run)
    return result


def spread(runs: Sequence[Run], column: str) -> tuple[float, float]:
    """Mean and sample standard deviation over the runs that did not diverge and have
    the column."""
    values = [run.summary.get(column) for run in runs if not run.diverged]
    return mean_sd([value for value in values if value is not None])


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for none, and NaN deviation for one)."""
    mean = float(np.mean(values)) if len(values) else float("nan")
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def table(runs: Sequence[Run]) -> str:
    """Returns a Markdown table: a row for each variant and micro-batch size."""
    metrics = options(headline_of(runs))
    unit = " (%)" if form(metrics[0]).endswith("%}") else ""
    heads = (f"A, moving{unit}", f"B, micro-batch{unit}")
    if len(metrics) == 1:
        heads = (f"{metric_name(metrics[0])}{unit}",)
    validation = validation_of(metrics[0])
    if any(validation in run.summary for run in runs):
        metrics, heads = [validation, *metrics], (f"validation{unit}", *heads)
    names = ("variant", "batch", "micro-batch", "devices", "seeds")
    rows: list[tuple] = [(*names, *heads, "train loss", "s / run")]
    for (variant, micro), members in groups(runs).items():
        alive = [run for run in members if not run.diverged]
        lost = len(members) - len(alive)
        first = (alive or members)[0].summary
        rows.append(
            (
                variant,
                first.get("batch_size", ""),
                micro,
                first.get("devices", ""),
                f"{len(members)}" + (f", {lost} diverged" if lost else ""),
                *(plus_minus(spread(members, each), form(each)) for each in metrics),
                plus_minus(spread(members, "final_train_loss"), "{:.3f}"),
                plus_minus((spread(members, "seconds")[0], np.nan), "{:.0f}"),
            )
        )
    return markdown(rows)


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """Returns a Markdown table, of which the first row is the header."""
    return tabulate(rows, headers="firstrow", tablefmt="github", disable_numparse=True)


def plus_minus(mean_sd: tuple[float, float], form: str) -> str:
    """Returns mean ± deviation, or as much of it as there is; no percent signs.

    Args:
        mean_sd: the two numbers, NaN where there is none.
        form: how each is printed, for `str.format`.
    """
    mean, sd = ("" if np.isnan(v) else show(v, form) for v in mean_sd)
    return f"{mean} ± {sd.lstrip('+')}" if sd else mean or "-"


def show(value: float, form: str) -> str:
    """Returns a number as `form` prints it, without percent sign; a half is rounded
    away from 0, which the binary digits of a float would leave to chance."""
    with decimal.localcontext(rounding=decimal.ROUND_HALF_UP):
        return form.format(decimal.Decimal(f"{value:.12g}")).rstrip("%")


def write_csv(path: pathlib.Path, runs: Sequence[Run]) -> None:
    """Writes one line for each run."""
    rows = pd.DataFrame([run.row() for run in runs], dtype=object)  # 1 stays 1, not 1.0
    rows.to_csv(path, index=False)


def read_csv(path: pathlib.Path) -> pd.DataFrame:
    """Reads what `write_csv` wrote, a row a run; NA where there is nothing.

    Raises:
        ValueError: the file is no table, or lacks columns of a comparison.
    """
    try:
        frame = pd.read_csv(
            path,
            dtype=dict.fromkeys(WHOLE, "Int64"),
            keep_default_na=False,
            na_values=[""],
        )
    except ValueError as error:  # of pandas, which does not name the file
        raise ValueError(
            f"{path} is no comparison.csv of train.compare: {error}"
        ) from error
    if not {*KEYS, *COSTS} <= {*frame.columns}:
        raise ValueError(
            f"{path} has the columns {list(frame.columns)}; expected a comparison.csv"
            f" of train.compare, with {[*KEYS, HEADLINE, *COSTS]}."
        )
    return frame


def from_frame(frame: pd.DataFrame) -> list[Run]:
    """Returns the runs of a table; their metrics by step are not in it."""
    summaries = [row.dropna().to_dict() for _, row in frame.astype(object).iterrows()]
    return [
        Run(summary if has_result(summary) else summary | {"diverged": True}, [])
        for summary in summaries
    ]


def has_result(summary: Mapping[str, Any]) -> bool:
    """Whether a run came to its end: one that diverged has no test. The loss alone does
    not tell, for a log may be lost."""
    return any(
        value is not None and (name == "final_train_loss" or name.startswith("test_"))
        for name, value in summary.items()
        if name != "test_images"
    )
