"""How well a trained network's normalisers know the statistics that they normalise by.

    python -m train.statistics --workdir=runs/short --data_dir=DIR

Runs the training images through the network in micro-batches of several sizes, as in
training, and compares four estimates of every layer's mean and variance with those of
all training images: observed in the micro-batch, predicted by the filter, filtered
(both combined), and the moving averages. The errors are

    mean      RMS of (mean - mean*) / std*
    var       RMS of log(var / var*)
    relative  the same less its mean over the layer: does not count a factor that all
              channels have in common, which no more than scales what the layer puts out

over channels and micro-batches: the paper's claim, taken at its word (its Fig. 5 and
Table 7). Works for the Kalman normalisers and for batch norm, in whose network it shows
what the filter would predict. Writes statistics.csv (by layer), statistics.json
(summary, with command, hardware, versions) and statistics.png into the run, and
gains.png where the gain was learned.
"""

import csv

import numpy as np
from absl import flags

from train import cli
from train.analysis import moments as estimates
from train.analysis import moments_figure as estimates_figure
from train.engine import workdir as wd

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_MICRO_BATCH_SIZES = flags.DEFINE_list(
    "micro_batch_sizes", ["1", "2", "4", "8", "16", "32"], "Micro-batch sizes."
)
_IMAGES = flags.DEFINE_integer(
    "images",
    0,
    "Training images to use; 0: all that the run trained on.",
    lower_bound=0,
)
_KEPT = flags.DEFINE_integer(
    "micro_batches",
    256,
    "Micro-batches whose estimates are compared; all images count for the truth.",
    lower_bound=2,
)


def main() -> None:
    """Restores the run, measures, prints, and writes CSV, JSON and figure."""
    workdir = cli.path(_WORKDIR)
    experiment, config = estimates.restore(workdir, cli.DATA_DIR.value)
    rows, sizes = [], [cli.micro_batch_size(size) for size in _MICRO_BATCH_SIZES.value]
    own = config.micro_batch_size if config.micro_batch_size in sizes else sizes[0]
    for size in sizes:
        truth, found = estimates.collect(
            experiment, config, size, _IMAGES.value, _KEPT.value
        )
        rows += estimates.rows_of(truth, found, size)
        if size == own:
            pictured = found
        print(f"micro-batch {size}: done", flush=True)
    summary = estimates.summarise(rows)
    print(estimates.table(summary))
    with (workdir / "statistics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    wd.write_json(
        workdir / "statistics.json",
        {**wd.provenance(), "config": config.to_dict(), "summary": summary},
    )
    estimates_figure.plot(workdir / "statistics.png", rows, summary, pictured, own)
    print(f"written: {workdir}/statistics.csv, .json, .png")
    if gains := estimates.learned_gains(experiment.state.params):
        everything = np.concatenate(list(gains.values()))
        low, median, high = np.quantile(everything, (0.0, 0.5, 1.0))
        print(f"learned gains: median {median:.3f}, {low:.3f} to {high:.3f}; gains.png")
        estimates_figure.plot_gains(workdir / "gains.png", gains)


if __name__ == "__main__":
    flags.adopt_module_key_flags(cli)
    cli.run(main)
