"""Study: U-Net on digit scenes, each normaliser at four learning rates, 3 seeds.

    python -m train.compare --config=configs/studies/segmentation.py --seeds=3 \\
        --workdir=runs/segmentation

Micro-batches of one image, and batch norm at 8 as well, where it has what it needs. A
comparison at one rate for all favours those whose rate it is: of each, take the rate
with the best mean over the seeds. Ramps are cut to the run: change its length here, not
by a flag.

Runs that differ in rate and seed alone are compiled once. Some of them alone are run by
``--variants="batch@1 rate 0.003,kalman@1 rate 0.003"``.
"""

from ml_collections import ConfigDict

from configs.experiments import scenes_segmentation
from configs.studies.micro_batch_sizes import ramp

RATES = (0.001, 0.003, 0.01, 0.03)
#: normaliser and micro-batch size
ENTRIES = (
    ("batch", 1),
    ("batch", 8),
    ("batch_renorm", 1),
    ("group_ws", 1),
    ("kalman", 1),
    ("kalman_wc", 1),
)


def get_config() -> ConfigDict:
    """Returns the study."""
    config = scenes_segmentation.get_config()
    config.variants = tuple(
        (
            f"{norm}@{size} rate {rate}",
            {"norm": norm, "micro_batch_size": size, "learning_rate": rate}
            | ramp(norm, config.total_steps),
        )
        for rate in RATES
        for norm, size in ENTRIES
    )
    return config
