"""Small data sets in the format of TFDS, made by its own builders from our images."""

import io
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

#: splits and images in each
SPLITS = {
    "cifar10": {"train": 24, "test": 10},
    "cifar100": {"train": 24, "test": 10},
    "svhn_cropped": {"train": 16, "test": 10, "extra": 8},
    "imagenet2012": {"train": 24, "validation": 10},
}


def picture(number, width=32, height=32, kind="png"):
    """A smooth random picture, encoded."""
    small = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def example(name, split, i):
    """The example `i` of a split, with the features that the set has."""
    number = i + 1000 * list(SPLITS[name]).index(split)
    if name == "imagenet2012":
        image = picture(number, width=60 + i, height=80 - i, kind="jpeg")
        return {"image": image, "label": 7 * i, "file_name": f"n{i:08}_{number}.JPEG"}
    more = {"coarse_label": i % 20} if name == "cifar100" else {}
    return {"image": picture(number), "label": i % 10, "id": f"{split}_{i}"} | more


def prepare(name, data_dir):
    """What `tfds build` does, but for the download."""
    tfds.disable_progress_bar()
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")

    def examples(split, count):
        yield from ((i, example(name, split, i)) for i in range(count))

    splits = {split: examples(split, n) for split, n in SPLITS[name].items()}
    builder._split_generators = lambda *_: splits
    nothing = mock.Mock(downloaded_size=0)
    builder._make_download_manager = lambda **_: nothing
    builder.download_and_prepare()
