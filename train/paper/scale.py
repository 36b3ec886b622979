"""The paper's runs at full size, or cut down; and what was cut, in words."""

from __future__ import annotations

import copy
from typing import Any

from ml_collections import ConfigDict

from configs import base
from configs.experiments import cifar10_short, cifar10_tiny
from configs.studies import micro_batch_sizes
from kalman_flax.models import ResNet
from train.data import scene_objects
from train.data.sets import check_prepared, examples

SCALES = ("full", "short", "smoke")

#: short, images on disk: about 4 million to train on, of updates of 256
_SHORT_ON_DISK = {"train_examples": 256_000, "epochs": 16, "image_size": 128}

#: smoke: two updates on images as they are, of the smallest network of its kind; those
#: for ImageNet keep their depth, at which a normaliser may fail that does not in a
#: shallow one, and see one batch until a network that can learn has learned it
_SMOKE = {
    "epochs": 2,
    "test_examples": 128,
    "image_size": 32,
    "crop_padding": 0,
    "flip": False,
    "log_steps": 1,
}
#: the networks for 224x224 images
SLIM = ("resnet50", "resnet101", "inception_v2")
RESNET8 = {"network": "cifar_resnet", "blocks_per_stage": 1, "width": 32}
_DEEP = {"width": 8, "epochs": 30, "eval_epochs": 30}

#: images to train and to test on of what is no set of `train.data.sets`
_OF_OBJECTS = {"coco": (118_287, 5_000), "scenes": scene_objects.EXAMPLES}

#: keys that change neither what is computed nor how much of it
_UNESSENTIAL = (
    "seed",
    "log_steps",
    "eval_epochs",
    "eval_batch_size",
    "checkpoint_epochs",
    "data_workers",
)


def scaled(full: ConfigDict, scale: str, data_dir: str | None) -> ConfigDict:
    """Returns the run of the paper, cut down.

    ``short`` is to fit a day on one GPU, all runs of a table together, or on CIFAR-10
    some 20 minutes a run on a CPU core. ``smoke`` makes two updates of a ResNet-8, or
    thirty of a network for ImageNet, slim but as deep as it is; a data set that is not
    there becomes the embedded digits.
    """
    config = copy.deepcopy(full)
    if scale == "full":
        return config
    config.update(schedule="cosine", step_epochs=(), step_factors=())
    if scale == "short":
        config.update(_short(config))
    else:
        slim = _DEEP if config.network in SLIM else RESNET8
        config.update(_SMOKE | slim, train_examples=config.batch_size)
        if config.norm == "group":  # of 32 groups, more than there are channels
            config.norm_options = base.get_config().norm_options
        try:
            check_prepared(config.dataset, data_dir)
        except FileNotFoundError:
            # Nothing is left of 8x8 pixels where a network for ImageNet normalises.
            config.dataset = "digits32" if config.network in SLIM else "digits"
    if config.norm == "batch_renorm":
        config.update(micro_batch_sizes.ramp(config.norm, updates(config)))
    return config


def _short(config: ConfigDict) -> dict[str, Any]:
    if config.dataset == "imagenet2012":
        epochs = _SHORT_ON_DISK["epochs"] * config.batch_size // 256
        return _SHORT_ON_DISK | {"epochs": max(1, epochs)}
    if config.network == "small_inception":  # as dear as six ResNet-20
        protocol = cifar10_tiny.get_config()
        keys = "train_examples", "epochs", "eval_epochs"
    else:
        protocol = cifar10_short.get_config()
        keys = "train_examples", "epochs", "network", "blocks_per_stage"
    return {key: protocol[key] for key in keys}


def _images(config: ConfigDict) -> tuple[int, int]:
    train, test = _OF_OBJECTS.get(config.dataset) or examples(config.dataset)
    return config.train_examples or train, config.test_examples or test


def updates(config: ConfigDict) -> int:
    """Returns how many updates a run makes."""
    return config.epochs * (_images(config)[0] // config.batch_size)


def reduced(full: ConfigDict, config: ConfigDict) -> str:
    """Returns what `config` has less than `full`, in words; empty for nothing."""
    parts = []
    if config.dataset == full.dataset:
        kinds = ("training images", "test images")
        for have, of, kind in zip(_images(config), _images(full), kinds):
            parts += [f"{have:,} of {of:,} {kind}"] if have != of else []
    else:
        have, of = ("{:,} + {:,} images of".format(*_images(c)) for c in (config, full))
        parts.append(f"{have} {config.dataset} in place of {of} {full.dataset}")
    if config.epochs != full.epochs:
        parts.append(f"{config.epochs} of {full.epochs} epochs")
    ours, theirs = _rest(config), _rest(full)
    parts += [
        f"{key} {ours[key]} in place of {theirs[key]}"
        for key in ours
        if ours[key] != theirs[key]
    ]
    return ", ".join(parts)


def _rest(config: ConfigDict) -> dict[str, Any]:
    """The keys that `reduced` has no words of its own for."""
    rest = config.to_dict()
    for key in (*_UNESSENTIAL, "train_examples", "test_examples", "epochs", "dataset"):
        del rest[key]
    if config.schedule != "step":
        del rest["step_epochs"], rest["step_drops"], rest["step_factors"]
    if config.dataset != "imagenet2012":
        del rest["image_size"]
    n, width = rest.pop("blocks_per_stage"), rest.pop("width")
    if config.network == "cifar_resnet":
        rest["network"] = f"ResNet-{6 * n + 2} of width {width or ResNet.width}"
    elif width:
        rest["network"] += f" of width {width}"
    return rest
