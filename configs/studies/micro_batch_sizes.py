"""Study: accuracy against the micro-batch size, all normalisers, batch 128.

    python -m train.compare --config=configs/studies/micro_batch_sizes.py --seeds=2 \\
        --micro_batch_sizes=1,2,8,128 --workdir=runs/sizes --data_dir=DIR

By the tiny protocol, ResNet-8;
``--config=configs/studies/micro_batch_sizes.py:short`` takes the short one, ResNet-20.

Those that normalise each image by itself are run once, at micro-batch 2: it means
nothing to them. Ramps and warm-ups that their authors give in steps of a long schedule
are cut to the same share of this one: change its length here, not by a flag.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.experiments import cifar10_short, cifar10_tiny
from kalman_flax._filter.state import check_choice

PROTOCOLS = {"tiny": cifar10_tiny, "short": cifar10_short}

#: statistics of the micro-batch
SHARED = (
    "batch",
    "batch_renorm",
    "moving_average",
    "cross_iteration",
    "online",
    "evonorm_b0",
    "kalman_paper",
    "kalman_paper_literal",
    "kalman_released",
    "kalman",
    "kalman_ws",
    "kalman_wc",
)
#: statistics of each image, or none
INDIVIDUAL = (
    "weight",
    "layer",
    "instance",
    "group",
    "group_ws",
    "group_kalman",
    "group_kalman_wc",
    "filter_response",
    "evonorm_s0",
)


def get_config(protocol: str = "tiny") -> ConfigDict:
    """Returns the study by one of `PROTOCOLS`.

    Raises:
        ValueError: there is no such protocol.
    """
    check_choice("protocol", protocol, tuple(PROTOCOLS))
    config = PROTOCOLS[protocol].get_config()
    steps = config.epochs * config.train_examples // config.batch_size
    config.variants = tuple(
        (norm, {"norm": norm} | ramp(norm, steps)) for norm in SHARED
    ) + tuple((norm, {"norm": norm, "micro_batch_size": 2}) for norm in INDIVIDUAL)
    return config


def ramp(norm: str, steps: int) -> dict[str, Any]:
    """Returns the config keys that cut a normaliser's ramp to a run of so many steps.

    Batch renorm: the same shares as of the 160,000 steps of its paper. Moving averages:
    until the window of 16 is full. Cross-iteration: a quarter of the run, while kernels
    change fast.
    """
    options: dict[str, Any] = {}
    if norm == "batch_renorm":
        options = {
            "warmup_steps": steps * 5 // 160,
            "r_steps": steps * 40 // 160,
            "d_steps": steps * 25 // 160,
        }
    elif norm == "moving_average":
        options = {"warmup_steps": 16, "renorm_warmup_steps": 16}
    elif norm == "cross_iteration":
        options = {"burn_in": steps // 4}
    return {"norm_options": options}
