"""Data sets and augmentation."""

import os
import pathlib

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests.train.common import tiny_config
from train.data.batches import (
    augment,
    draw_crops,
    epoch_order,
    make_batches,
    make_standardize,
)
from train.data.parts import part_of
from train.data.sets import load_dataset

CIFAR_DIR = os.environ.get("TFDS_DATA_DIR", "")


def test_digits_are_scikit_learns():
    data = load_dataset("digits")
    source = load_digits()
    assert data.train.images.dtype == np.uint8
    images = np.concatenate([data.train.images, data.test.images])
    np.testing.assert_array_equal(images[..., 0], source.images)
    labels = np.concatenate([data.train.labels, data.test.labels])
    np.testing.assert_array_equal(labels, source.target)
    assert (len(data.train.labels), len(data.test.labels)) == (1500, 297)


@pytest.mark.slow  # beside the small sets of test_sets.py
@pytest.mark.skipif(
    not (pathlib.Path(CIFAR_DIR) / "cifar10").is_dir() or not CIFAR_DIR,
    reason="no CIFAR-10: TFDS_DATA_DIR names no directory that holds cifar10",
)
def test_cifar10_is_the_real_one():
    """Counts, and the channel means and deviations everybody knows."""
    data = load_dataset("cifar10")
    assert data.train.images.shape == (50_000, 32, 32, 3)
    assert data.test.images.shape == (10_000, 32, 32, 3)
    assert data.classes[:4] == ("airplane", "automobile", "bird", "cat")
    np.testing.assert_array_equal(np.bincount(data.train.labels), [5000] * 10)
    np.testing.assert_array_equal(np.bincount(data.test.labels), [1000] * 10)
    pixels = data.train.images / np.float32(255)
    np.testing.assert_allclose(
        pixels.mean((0, 1, 2), dtype=np.float64), [0.4914, 0.4822, 0.4465], atol=5e-5
    )
    np.testing.assert_allclose(
        pixels.std((0, 1, 2), dtype=np.float64), [0.2470, 0.2435, 0.2616], atol=5e-5
    )


def test_missing_data_says_how_to_prepare_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="tfds build cifar10"):
        load_dataset("cifar10")
    with pytest.raises(FileNotFoundError, match="elsewhere/cifar10"):
        load_dataset("cifar10", str(tmp_path / "elsewhere"))
    assert not list(tmp_path.iterdir())  # and nothing was started


def test_unknown_data_set():
    with pytest.raises(ValueError, match=r"'mnist'; expected one of \['digits', 'd"):
        load_dataset("mnist")


def test_standardize():
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 3), np.uint8)
    x = np.asarray(make_standardize("channel", images)(jax.device_put(images)))
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=1e-5)
    x = np.asarray(make_standardize("channel", None)(images))
    expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(x, expected, atol=1e-5)
    with pytest.raises(ValueError, match="not in memory"):
        make_standardize("pixel", None)
    x = np.asarray(make_standardize("pixel", images)(jax.device_put(images)))
    np.testing.assert_allclose(x, (images - images.mean(0)) / 128, atol=1e-5)


def test_an_epoch_visits_every_example_once():
    order = epoch_order(seed=1, epoch=2, examples=1000)
    np.testing.assert_array_equal(np.sort(order), np.arange(1000))
    assert np.any(order != epoch_order(1, 3, 1000))
    assert np.any(order != epoch_order(2, 2, 1000))


def test_augment_crops_and_mirrors():
    """Every output is one of the 2 x 25 windows of its padded input, all are drawn."""
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {}
    for row in range(5):
        for col in range(5):
            window = padded[row : row + 8, col : col + 8]
            windows[window.tobytes()] = (row, col, False)
            windows[window[:, ::-1].tobytes()] = (row, col, True)
    batch = np.repeat(image[None], 2000, axis=0)
    crops = draw_crops(jax.random.key(0), 2000, padding=2, flip=True)
    out = np.asarray(augment(batch, crops, padding=2))
    drawn = [windows[x.tobytes()] for x in out]
    assert set(drawn) == set(windows.values())
    mirrored = np.mean([mirror for *_, mirror in drawn])
    assert abs(mirrored - 0.5) < 4 * np.sqrt(0.25 / 2000)
    crops = draw_crops(jax.random.key(0), 2000, padding=0, flip=False)
    same = np.asarray(augment(batch, crops, padding=0))
    np.testing.assert_array_equal(same, batch)


@pytest.mark.parametrize("sort", [False, True])
def test_batches_visit_every_example_once_an_epoch(sort):
    labels = np.random.default_rng(0).integers(0, 5, 64).astype(np.int32)
    sort_by = labels if sort else None
    batch = make_batches(64, batch_size=16, seed=3, sort_by=sort_by)
    epochs = [np.concatenate([batch(4 * e + s) for s in range(4)]) for e in range(2)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(64))
    assert np.any(epochs[0] != epochs[1])
    changes = np.count_nonzero(np.diff(labels[batch(0)]))
    assert (changes < 5) == sort


def test_classes_are_labelled_anew_and_validation_images_are_kept_back():
    whole = load_dataset("digits")
    config = tiny_config(classes=(7, 3), train_examples=64, validation_examples=20)
    part = part_of(whole, config)
    assert (part.num_classes, part.classes) == (2, ("7", "3"))
    chosen = np.isin(whole.train.labels, (7, 3))
    images = whole.train.images[chosen]
    labels = np.where(whole.train.labels[chosen] == 7, 0, 1)
    for split, at in ((part.train, slice(64)), (part.validation, slice(-20, None))):
        np.testing.assert_array_equal(split.images, images[at])
        np.testing.assert_array_equal(split.labels, labels[at])
    assert part.test.examples == np.isin(whole.test.labels, (7, 3)).sum()


@pytest.mark.parametrize("keys, why", [
    ({"classes": (3,)}, "two or more different labels"),
    ({"classes": (3, 3, 4)}, "two or more different labels"),
    ({"classes": (3, 10)}, "from 0 to 9"),
    ({"validation_examples": 1500, "train_examples": 0}, "leave 0 to train on"),
    ({"validation_examples": 1450, "train_examples": 64}, "expected to leave 64"),
])  # fmt: skip
def test_parts_that_there_are_not(keys, why):
    with pytest.raises(ValueError, match=why):
        part_of(load_dataset("digits"), tiny_config(**keys))
