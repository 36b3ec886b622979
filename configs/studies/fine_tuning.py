"""Study: fine-tuning at micro-batches of 1 and 2 what batch norm at 128 pre-trained.

First the pre-training, on classes 0 to 4 of CIFAR-10, as
configs/experiments/cifar10_half.py says: runs/half_batch, runs/half_group and
runs/half_group_ws. Then, on classes 5 to 9:

    python -m train.compare --config=configs/studies/fine_tuning.py --seeds=3 \\
        --micro_batch_sizes=1,2 --workdir=runs/fine_tuning --data_dir=DIR

Every rate is run. Choose the rate of each variant by the column "validation", on 2,000
training images that no update sees, and report the test accuracy at that rate.

"alone" is one image an update, and as many images in all. There the rate of the name is
scaled with the batch, and running statistics are averaged over as many images.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.experiments import cifar10_half

RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
#: where the pre-trained networks are, by what they normalise with
RUNS = {
    "batch": "runs/half_batch",
    "group": "runs/half_group",
    "group_ws": "runs/half_group_ws",
}
#: the loader starts what this keeps from the checkpoint's statistics
SEEDED = {"calibrate": "both"}
#: updates of the study's schedule, and images in each
STEPS, BATCH_SIZE = 160, 32
ALONE = {
    "batch_size": 1,
    "micro_batch_size": 1,
    "total_steps": STEPS * BATCH_SIZE,
    "stats_momentum": 0.9 ** (1 / BATCH_SIZE),
}


def get_config() -> ConfigDict:
    """Returns the study."""
    config = cifar10_half.get_config()
    config.classes = (5, 6, 7, 8, 9)
    config.init_from = RUNS["batch"]
    config.plugins = ("train.studies.controls",)
    config.train_examples = 5_120
    config.validation_examples = 2_000
    config.batch_size = BATCH_SIZE
    config.micro_batch_size = 2
    config.epochs = 0
    config.total_steps = STEPS
    config.variants = tuple(
        (f"{name} rate {rate}", keys | {"learning_rate": rate * images / BATCH_SIZE})
        for rate in RATES
        for name, keys in _entries()
        for images in [keys.get("batch_size", BATCH_SIZE)]
    )
    return config


def _entries() -> list[tuple[str, dict[str, Any]]]:
    """What is compared, and the config keys that choose it."""
    return [
        ("frozen", {"norm": "frozen_batch"}),
        ("frozen clipped", {"norm": "frozen_batch", "clip_norm": 1.0}),
        ("batch", {"norm": "batch"}),
        ("batch@32", {"norm": "batch", "micro_batch_size": 32}),
        ("group", {"norm": "group", "init_from": RUNS["group"]}),
        ("group_ws", {"norm": "group_ws", "init_from": RUNS["group_ws"]}),
        ("kalman", {"norm": "kalman"}),
        ("kalman seeded", {"norm": "kalman", "norm_options": SEEDED}),
        (
            "kalman seeded constant",
            {
                "norm": "control_constant_correction",
                "norm_options": SEEDED | {"gain": 0.0},
            },
        ),
        ("frozen alone", {"norm": "frozen_batch"} | ALONE),
        ("batch alone", {"norm": "batch"} | ALONE),
        (
            "kalman seeded alone",
            {"norm": "kalman", "norm_options": SEEDED} | ALONE,
        ),
    ]
