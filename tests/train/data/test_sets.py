"""Data sets in the format of TFDS, and folders of images: read, and trained on."""

import io
import json
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from PIL import Image

from tests.reference.slow import few_quick
from tests.train.common import tiny_config
from tests.train.tfds_data import SPLITS, example, picture, prepare
from train.data import sets
from train.data.sets import load_dataset
from train.engine import loop
from train.engine.experiment import build

CLASSES = {"cifar10": 10, "cifar100": 100, "svhn_cropped": 10, "imagenet2012": 1000}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Holds all sets of TFDS, and in image_folder/ one of images by class."""
    root = tmp_path_factory.mktemp("data")
    for name in SPLITS:
        prepare(name, root)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("cat", "dog", "eel")):
            folder = root / "image_folder" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                data = picture(100 * label + i, width=50, height=40)
                (folder / f"{i}.PNG").write_bytes(data)
            (folder / "notes.txt").write_text("no image")
    return root


def load(name, data_dir, **options):
    if name == "folder":
        data_dir = data_dir / "image_folder"
    return load_dataset(name, str(data_dir), **options)


def expected(name, splits):
    """Images and labels of small sets, by the bytes of the image."""
    examples = [example(name, s, i) for s in splits for i in range(SPLITS[name][s])]
    decoded = [np.asarray(Image.open(io.BytesIO(e["image"]))) for e in examples]
    return {image.tobytes(): e["label"] for image, e in zip(decoded, examples)}


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn_cropped"])
def test_sets_in_memory_hold_what_was_prepared(data_dir, name):
    data = load(name, data_dir)
    assert data.num_classes == len(data.classes) == CLASSES[name]
    # The names of CIFAR's classes come with the download that `prepare` leaves out.
    assert data.classes[3] == "3" and data.test_name == "test"
    train = ["train", "extra"] if name == "svhn_cropped" else ["train"]
    for split, names in ((data.train, train), (data.test, ["test"])):
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
        found = dict(zip(map(bytes, split.images), split.labels.tolist()))
        assert found == expected(name, names)


@pytest.mark.parametrize("name, classes", [("imagenet2012", 1000), ("folder", 3)])
def test_sets_on_disk_hold_what_was_prepared(data_dir, name, classes):
    data = load(name, data_dir, image_size=16)
    assert data.num_classes == len(data.classes) == classes
    assert data.classes[:2] == (
        ("cat", "dog") if name == "folder" else ("n01440764", "n01443537")
    )
    assert data.test_name == ("val" if name == "folder" else "validation")
    assert (data.train.examples, data.test.examples) == (24, 9 + (name != "folder"))
    split = data.train.read(np.arange(24))
    assert split.images.shape == (24, 16, 16, 3) and split.images.dtype == np.uint8
    if name == "folder":
        assert np.bincount(split.labels).tolist() == [8, 8, 8]
        assert np.count_nonzero(np.diff(split.labels)) > 3  # not class by class
    else:
        assert sorted(split.labels) == [7 * i for i in range(24)]


@pytest.mark.parametrize(
    "name", few_quick([*SPLITS, "folder"], ["cifar10", "imagenet2012", "folder"])
)
def test_every_set_trains(data_dir, tmp_path, name):
    """Two updates and a test, by the command's own function."""
    config = tiny_config(
        dataset=name,
        image_size=32,
        train_examples=0,
        norm="batch",
        batch_size=16,
        micro_batch_size=8 if name == "imagenet2012" else 16,
        crop_padding=0 if name in ("imagenet2012", "folder") else 4,
        flip=True,
        epochs=2,
        log_steps=1,
        eval_epochs=2,
        eval_batch_size=16,
    )
    root = data_dir / "image_folder" if name == "folder" else data_dir
    summary = loop.train(config, tmp_path, str(root))
    assert summary["train_images"] == 24
    assert summary["test_images"] == (9 if name == "folder" else 10)
    assert 0 <= summary["test_moving_accuracy"] <= 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    waits = [json.loads(line).get("data_wait", 0) for line in lines]
    assert len(waits) == 3 and all(0 <= wait <= 1 for wait in waits)


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar100", "svhn_cropped", "imagenet2012"]
)
def test_missing_data_says_how_to_prepare_it(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    message = rf"tfds build {name} --file_format=array_record --data_dir=DIR\n\(.*[MG]B"
    with pytest.raises(FileNotFoundError, match=message):
        load_dataset(name)
    with pytest.raises(FileNotFoundError, match=f"elsewhere/{name}"):
        load_dataset(name, str(tmp_path / "elsewhere"))
    assert not list(tmp_path.iterdir())  # and nothing was started


def test_another_file_format_is_refused(tmp_path):
    prepare("cifar10", tmp_path)
    [info] = tmp_path.glob("cifar10/*/dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"not array_record.*\n *tfds build cifar10"):
        load_dataset("cifar10", str(tmp_path))


def test_unknown_data_set():
    with pytest.raises(ValueError, match=r"'mnist'; expected one of \['digits', 'd"):
        load_dataset("mnist")


def test_a_folder_has_no_default():
    with pytest.raises(ValueError, match="pass --data_dir=DIR, with images in DIR/tr"):
        load_dataset("folder")


@pytest.mark.parametrize("error", [SyntaxError, OSError, MemoryError])
def test_whatever_pillow_raises_names_the_image(data_dir, monkeypatch, error):
    data = load("folder", data_dir)
    monkeypatch.setattr("train.data.encoded.decode", Mock(side_effect=error))
    with pytest.raises(ValueError, match=r"image .*/val/.*\.PNG cannot be decoded"):
        data.test.read(np.arange(1))


@pytest.mark.parametrize("name", ["cifar10", "folder"])
def test_more_examples_than_there_are(data_dir, name):
    train = load(name, data_dir).train
    assert train.take(24).examples == train.take(0).examples == 24
    for asked in (25, -1):
        with pytest.raises(ValueError, match=f"first {asked} of 24 images; .*train_ex"):
            train.take(asked)


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
@pytest.mark.parametrize("label", [-1, 1000])
def test_labels_that_no_class_has(data_dir, monkeypatch, name, label):
    class Wrong(list):
        def __init__(self, source):
            image = np.zeros((32, 32, 3), np.uint8)
            example = {"image": image, "label": label, "file_name": b"n1.JPEG"}
            super().__init__([example])
            self.dataset_info = source.dataset_info

    open_ = sets._open
    monkeypatch.setattr(
        sets, "_open", lambda *a, **options: Wrong(open_(*a, **options))
    )
    sets._read.cache_clear()
    with pytest.raises(
        ValueError, match=rf"label.* {label}; expected 0 to 9|{label} to"
    ):
        load(name, data_dir).train.read(np.arange(1))
    sets._read.cache_clear()


@pytest.mark.parametrize(
    "key, value, match",
    [("sort_batches", True, "labels in memory"), ("standardize", "pixel", "channel")],
)
def test_what_needs_images_in_memory(data_dir, key, value, match):
    config = tiny_config(dataset="imagenet2012", image_size=32, **{key: value})
    config.train_examples = 0
    with pytest.raises(ValueError, match=match):
        build(config, str(data_dir), jax.devices()[:1])
