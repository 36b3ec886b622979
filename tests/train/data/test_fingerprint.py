"""The data of a run is known again, and what changed about it is said in words."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.data.pictures import PNG, put
from tests.train.tfds_data import prepare
from train.data.batches import Split, make_standardize
from train.data.digest import octets
from train.data.fingerprint import check_same, compare, fingerprint
from train.data.sets import Dataset, load_dataset


def of_folder(where):
    data = load_dataset("folder", str(where), image_size=8)
    # as a workdir keeps it
    return json.loads(
        json.dumps(fingerprint("folder", data, make_standardize("channel", None)))
    )


def of_memory(images, labels, classes=("a", "b"), kind="channel", **more):
    split = Split(images, labels)
    data = Dataset(split, split, len(classes), classes, **more)
    return fingerprint("ours", data, make_standardize(kind, images))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3).T,
        np.float32(3),
        np.zeros((0, 2)),
        np.array([True, False]),
        np.array([1, 2], jnp.bfloat16),
    ],
    ids=["columns", "scalar", "empty", "bool", "bfloat16"],
)
def test_the_bytes_of_an_array(array):
    assert bytes(octets(array)) == array.tobytes()


def test_the_place_of_the_data_does_not_matter(root, tmp_path_factory):
    kept = of_folder(root)
    moved = tmp_path_factory.mktemp("moved") / "data"
    shutil.copytree(root, moved)
    put(moved / "train" / "cat" / ".DS_Store")
    assert compare(kept, of_folder(moved)) == []
    check_same(kept, of_folder(moved))
    assert kept["train"]["by_class"] == [2, 2] and kept["test"]["by_class"] == [1, 1]


def rename(root, old="cat", new="cow"):
    for split in ("train", "val"):
        (root / split / old).rename(root / split / new)


def add_class(root):
    put(root / "train" / "ape" / "1.png")
    put(root / "val" / "ape" / "1.png")


CHANGES = {
    "a class renamed": (rename, ["class 0 was 'cat', is 'cow'"]),
    "a class renamed, and the order": (
        lambda root: rename(root, "cat", "pig"),
        ["class 0 was 'cat', is 'dog'", "class 1 was 'dog', is 'pig'"],
    ),
    "a class more": (
        add_class,
        [
            "there were 2 classes, there are 3",
            "'ape' came",
            "train had 4 images, has 5",
            "test had 2 images, has 3",
        ],
    ),
    "an image more": (
        lambda root: put(root / "train" / "dog" / "3.png"),
        ["train had 4 images, has 5", "train had 2 of 'dog', has 3"],
    ),
    "an image less": (
        lambda root: (root / "val" / "dog" / "9.png").unlink(),
        ["test had 2 images, has 1", "test had 1 of 'dog', has 0"],
    ),
    "an image in another class": (
        lambda root: (root / "train" / "cat" / "1.png").rename(
            root / "train" / "dog" / "3.png"
        ),
        ["train had 2 of 'cat', has 1", "train had 2 of 'dog', has 3"],
    ),
    "a file renamed": (
        lambda root: (root / "train" / "cat" / "1.png").rename(
            root / "train" / "cat" / "5.png"
        ),
        ["train has as many images, but others: their names, sizes or pixels differ"],
    ),
    "another image": (
        lambda root: put(root / "val" / "cat" / "9.png", PNG + b"more"),
        ["test has as many images, but others: their names, sizes or pixels differ"],
    ),
    "another folder": (
        lambda root: (root / "val").rename(root / "test"),
        ["name of test was val, is test"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_said(root, change):
    kept = of_folder(root)
    apply, said = CHANGES[change]
    apply(root)
    assert compare(kept, of_folder(root)) == said
    with pytest.raises(ValueError, match=f"^the data is not what .*: {said[0]}"):
        check_same(kept, of_folder(root))


def test_images_in_memory():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (50, 4, 4, 3), np.uint8)
    labels = random.integers(0, 2, 50).astype(np.int32)
    kept = of_memory(images, labels)
    assert compare(kept, of_memory(images.copy(), labels)) == []
    again = images.copy()
    again[7, 1, 1, 1] ^= 1
    others = "train has as many images, but others: their names, sizes or pixels differ"
    assert compare(kept, of_memory(again, labels))[0] == others
    assert compare(kept, of_memory(images, 1 - labels))[0].startswith("train had ")
    assert compare(kept, of_memory(images, labels, ("b", "a"))) == [
        "class 0 was 'a', is 'b'",
        "class 1 was 'b', is 'a'",
    ]
    assert "shape of train was [4, 4, 3], is [2, 4, 3]" in compare(
        kept, of_memory(images[:, :2], labels)
    )
    [said] = compare(kept, of_memory(images, labels, kind="pixel"))
    assert said.startswith("the scale that images are standardised by was 7")
    assert compare(kept, of_memory(images, labels, version="2.0"))[0] == (
        "its version was '', is '2.0'"
    )
    rounded = {k: [x * (1 + 1e-6) for x in v] for k, v in kept["standardize"].items()}
    assert compare(kept, kept | {"standardize": rounded}) == []


def test_another_form_of_the_fingerprint():
    kept = of_memory(np.zeros((2, 1, 1, 1), np.uint8), np.arange(2, dtype=np.int32))
    for other in ({}, {"classes": []}, kept | {"train": {}}, kept | {"classes": 3}, 3):
        assert compare(other, kept) == [
            "its description is damaged or of another version"
        ]


def test_a_thousand_classes_make_a_short_message():
    labels = np.arange(1000, dtype=np.int32)
    images = np.zeros((1000, 1, 1, 1), np.uint8)
    images[::2] = 9
    names = tuple(f"c{i:04}" for i in range(1000))
    kept = of_memory(images, labels, names)
    found = compare(kept, of_memory(images, labels, ("a", *names[:-1])))
    assert len(found) == 11 and found[-1] == "and 990 more"


@pytest.mark.parametrize("name, version", [("cifar10", "3.0.2"), ("imagenet2012", "")])
def test_sets_of_tfds_have_a_version(tmp_path, name, version):
    prepare(name, tmp_path)
    data = load_dataset(name, str(tmp_path))
    kept = fingerprint(name, data, make_standardize("channel", None))
    assert kept["version"].startswith(version) and kept["version"].count(".") == 2
    assert kept["train"]["images"] == 24
    assert ("sha256" in kept["train"]) == (name == "cifar10")
    json.dumps(kept)
