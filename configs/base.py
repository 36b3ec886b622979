"""Every key that an experiment can set, with its default; not an experiment itself.

docs/config.md has them as a page, which is written by

    python -m configs.base > docs/config.md

A key is added here, and nowhere else.
"""

from __future__ import annotations

import textwrap
from typing import Any

from ml_collections import ConfigDict

from configs import schema
from configs.schema import Key

#: more would be a slip of the keyboard, and take all memory
_MOST_EXAMPLES = 2**20
#: updates of a run
MOST_STEPS = 10**8

SECTIONS: dict[str, dict[str, Key]] = {
    "Task": {
        "task": Key("classification", "a task of the engine or of a plugin, by name"),
        "plugins": Key(
            (),
            "modules with NORMALIZERS, TASKS or DETECTORS of their own, to be named",
            of=str,
        ),
    },
    "Data": {
        "dataset": Key(
            "digits",
            "digits, digits32, digits32_colour, cifar10, cifar100, svhn_cropped (with"
            " its extra images), in memory; or imagenet2012, folder"
            " (data_dir/train/CLASS/, data_dir/val/CLASS/), read from disk. To segment"
            " or detect: scenes, in memory; to segment: pairs (data_dir/train/images/,"
            " data_dir/train/masks/); to detect: coco (data_dir/annotations/,"
            " train2017/, val2017/), read from disk",
        ),
        "train_examples": Key(0, "use the first so many to train; 0: all", least=0),
        "test_examples": Key(0, "use the first so many to test; 0: all", least=0),
        "validation_examples": Key(
            0,
            "images in memory: keep the last so many training images back, to choose"
            " settings by; the summary has what the last state comes to on them",
            least=0,
        ),
        "classes": Key(
            (),
            "images in memory: those of these classes alone, labelled from 0 in this"
            " order; empty: all",
            of=int,
            least=0,
        ),
        "standardize": Key(
            "channel",
            "channel: mean 0, standard deviation 1; pixel: (x - mean) / 128",
            choices=("channel", "pixel"),
        ),
        "image_size": Key(
            224,
            "images on disk: to train, random crops of 8 to 100 % of the area, resized"
            " to this; to test, of the shorter side resized to 256/224 of this the"
            " centre",
            least=1,
            most=8192,
        ),
        "max_pixels": Key(
            89_478_485,
            "images on disk: larger ones are refused; by default Pillow's own limit",
            least=1,
        ),
        "data_workers": Key(
            0,
            "images on disk: processes that decode them; 0: threads, one a core",
            least=0,
            most=1024,
        ),
        "crop_padding": Key(
            0,
            "images in memory: random crops after padding by so many pixels",
            least=0,
            most=256,
        ),
        "flip": Key(False, "random horizontal flips"),
    },
    "Detection": {
        "short_side": Key(
            800, "coco: the shorter side of images, in pixels", least=1, most=8192
        ),
        "long_side": Key(1333, "coco: their longer side, at most", least=1, most=16384),
        "test_short_side": Key(
            0, "short_side of images to test on; 0: the same", least=0, most=8192
        ),
        "test_long_side": Key(
            0, "long_side of images to test on; 0: the same", least=0, most=16384
        ),
        "canvas_multiple": Key(
            32,
            "coco: images lie on canvases, landscape or portrait, whose sides are the"
            " two above, rounded up to a multiple of this",
            least=1,
            most=1024,
        ),
        "train_split": Key("train", "coco: what to train on", choices=("train", "val")),
    },
    "Network": {
        "network": Key(
            "cifar_resnet",
            "a name in kalman_flax.NETWORKS; to segment, in kalman_flax.SEGMENTERS; to"
            " detect, in kalman_flax.DETECTORS",
        ),
        "network_options": Key(
            ConfigDict(),
            "of a detector, attributes of it or of its Recipe:"
            " --config.network_options.roi_samples=512",
        ),
        "blocks_per_stage": Key(
            1,
            "cifar_resnet, cifar_resnet_v1, nf_resnet: n of their 6n + 2 layers",
            least=1,
            most=1000,
        ),
        "width": Key(
            0,
            "channels of the first stage, but of small_inception; 0: the network's own",
            least=0,
            most=4096,
        ),
        "scan_blocks": Key(
            False,
            "cifar_resnet(_v1): nn.scan over equal blocks; slow on a CPU",
        ),
        "dtype": Key("float32", "of the computation", choices=("float32", "bfloat16")),
        "remat": Key(
            False,
            "hold less: norms and activations are computed again in the backward pass",
        ),
    },
    "Normaliser": {
        "norm": Key("kalman", "a name in kalman_flax.NORMALIZERS, or of a plugin"),
        "norm_options": Key(
            ConfigDict(), "its attributes: --config.norm_options.gain=0.5"
        ),
        "stats_momentum": Key(0.9, "of the running statistics", least=0, most=1),
        "calibrate_batches": Key(
            0,
            "batches that set the running statistics before the first update, by"
            " forward passes; 10 for norm_options.calibrate",
            least=0,
            most=10**4,
        ),
    },
    "Start": {
        "init_from": Key(
            "",
            "parameters and running statistics to start from: the workdir of a run, a"
            " variables.npz of train.export, or a .safetensors of torchvision, timm or"
            " Hugging Face; read once, not when a run goes on",
        ),
        "new_layers": Key(
            ("head/*",),
            "with init_from: what may be missing there or have another shape, and then"
            " stays as initialised, by patterns of its paths",
            of=str,
        ),
    },
    "Batches": {
        "batch_size": Key(
            32,
            "examples per parameter update, over all devices",
            least=1,
            most=_MOST_EXAMPLES,
        ),
        "micro_batch_size": Key(
            2, "examples that share statistics", least=1, most=_MOST_EXAMPLES
        ),
        "accumulate": Key(
            1,
            "parts that a device runs one after the other, to save memory",
            least=1,
            most=_MOST_EXAMPLES,
        ),
        "sync_statistics": Key(
            False, "share statistics over all micro-batches of a part"
        ),
        "sort_batches": Key(
            False, "sort a batch by class, so that a micro-batch is of one class"
        ),
    },
    "Optimisation": {
        "optimizer": Key("sgd", "by name", choices=("sgd", "adamw", "lars")),
        "optimizer_options": Key(
            ConfigDict(),
            "its options as of optax: --config.optimizer_options.nesterov=True",
        ),
        "sgd_momentum": Key(0.9, "of sgd and lars", least=0, below=1),
        "weight_decay": Key(2e-4, "on kernels only", least=0),
        "clip_norm": Key(
            0.0, "the gradient is made no longer than this; 0: left as it is", least=0
        ),
        "clip_adaptive": Key(
            0.0,
            "the gradient of each unit, but for the head's, is made no longer than this"
            " share of its weights (AGC; 0.01 to 0.16); 0: left as it is",
            least=0,
        ),
        "freeze": Key(
            (),
            'parameters that stay as they are, by patterns of their paths: ("stem*",)',
            of=str,
        ),
    },
    "Schedule": {
        "epochs": Key(
            10, "length of the run; 0 where total_steps says it", least=0, most=10**6
        ),
        "total_steps": Key(0, "the same in updates", least=0, most=MOST_STEPS),
        "learning_rate": Key(0.1, "the largest of the run", least=0),
        "warmup_epochs": Key(
            0, "the rate rises over so many epochs", least=0, most=10**6
        ),
        "warmup_steps": Key(0, "the same in updates", least=0, most=MOST_STEPS),
        "warmup_from": Key(
            0.0, "the share of the rate that the warm-up starts from", least=0, most=1
        ),
        "schedule": Key(
            "cosine", "how the rate falls after it", choices=("cosine", "step")
        ),
        "step_epochs": Key(
            (),
            "step: at these epochs the rate is multiplied",
            of=int,
            least=0,
            most=10**6,
        ),
        "step_drops": Key(
            (), "step: the same in updates", of=int, least=0, most=MOST_STEPS
        ),
        "step_factors": Key((), "step: by these factors", of=float, least=0),
        "seed": Key(0, "of all random numbers", least=0, most=2**32 - 1),
    },
    "Reporting": {
        "log_steps": Key(20, "a line of metrics every so many updates", least=1),
        "eval_epochs": Key(1, "a test every so many epochs, and at the end", least=1),
        "checkpoint_epochs": Key(
            1, "a checkpoint every so many epochs, and at the end", least=1
        ),
        "eval_batch_size": Key(
            500, "examples at a time in tests", least=1, most=_MOST_EXAMPLES
        ),
        "profile_steps": Key(
            (), "(first, last) updates of a profiler's trace", of=int, least=0
        ),
        "debug_nans": Key(False, "name the first layer that gives a NaN; slow"),
    },
    "Study": {
        "variants": Key(
            (),
            "(name, keys to change) of the runs that train.compare puts side by side",
            of=tuple,
        ),
    },
}
#: all of them by name
KEYS = {name: key for keys in SECTIONS.values() for name, key in keys.items()}


def get_config() -> ConfigDict:
    """Returns the defaults that the other files in this folder start from."""
    return ConfigDict({name: schema.plain(key.default) for name, key in KEYS.items()})


def check(config: Any) -> None:
    """Refuses a config whose keys are not those above, or have values that cannot be.

    Raises:
        ValueError: the message names the key.
    """
    schema.check(config, KEYS)


def listing() -> str:
    """Returns the keys as text for a terminal."""
    lines = ["Keys of a config, with their defaults:"]
    for section, keys in SECTIONS.items():
        lines.append(f"\n{section}:")
        for name, key in keys.items():
            lines.append(f"  --config.{name}={_shown(key)}")
            text = f"{key.about} ({key.expected})"
            lines += textwrap.wrap(
                text, 80, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    return "\n".join(lines)


def page() -> str:
    """Returns docs/config.md."""
    lines = [
        "# Keys of a config",
        "",
        "`python -m configs.base > docs/config.md` wrote this page from"
        " `configs/base.py`.",
        "A config is a Python file whose `get_config` starts from"
        " `configs.base.get_config()`.",
        "On the command line a key is `--config.KEY=VALUE`, an option"
        " `--config.norm_options.gain=0.5`.",
        "What is no key, or out of its range, is refused before a run begins.",
    ]
    for section, keys in SECTIONS.items():
        lines += ["", f"## {section}", ""]
        lines += ["| key | default | expected | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{name}` | `{_shown(key)}` | {key.expected} | {key.about} |"
            for name, key in keys.items()
        ]
    return "\n".join(lines)


def _shown(key: Key) -> str:
    return str(schema.plain(key.default))


if __name__ == "__main__":
    print(page())
