"""Study: each normaliser at the learning rate that suits it, by the short protocol.

    python -m train.compare --config=configs/studies/learning_rates.py --seeds=3 \\
        --workdir=runs/rates --data_dir=DIR

A comparison at one rate for all favours those whose rate it is. "falling" are gains
that fall to 0 over the run, from their default or from 0.005. Ramps and falling gains
are cut to the protocol's 800 updates: change its length here, not by a flag. With
``--config.warmup_epochs=1`` the rate rises to it over the first epoch, and with
``--config.clip_norm=1.0`` gradients are clipped, which KN needs at high rates.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.experiments import cifar10_short
from configs.studies.micro_batch_sizes import INDIVIDUAL, SHARED, ramp

RATES = (0.05, 0.1, 0.2, 0.4, 0.8)


def get_config() -> ConfigDict:
    """Returns the study."""
    config = cifar10_short.get_config()
    config.eval_epochs = config.epochs
    steps = config.epochs * config.train_examples // config.batch_size
    config.variants = tuple(
        (f"{name} rate {rate}", keys | {"learning_rate": rate})
        for rate in RATES
        for name, keys in _entries(steps)
    )
    return config


def _entries(steps: int) -> list[tuple[str, dict[str, Any]]]:
    """What is compared, and the config keys that choose it."""
    sizes = [("batch", 128), ("kalman_wc", 1)]
    sizes += [(norm, 2) for norm in SHARED + INDIVIDUAL]
    entries = [
        (f"{norm}@{size}", {"norm": norm, "micro_batch_size": size} | ramp(norm, steps))
        for norm, size in sizes
    ]
    return entries + [
        (
            f"{norm} falling{start}@{size}",
            {
                "norm": norm,
                "micro_batch_size": size,
                "norm_options": {"decay_steps": steps} | gain,
            },
        )
        for norm in ("kalman_wc", "kalman_ws")
        for start, gain in (("", {}), (" from 0.005", {"gain": 0.005}))
        for size in (1, 2)
    ]
