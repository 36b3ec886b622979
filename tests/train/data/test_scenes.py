"""Digit scenes: exact masks, digits of its own for each split, seeds."""

import numpy as np
import pytest

from train.data import scenes
from train.data.scenes import make_scenes
from train.data.sets import load_dataset


@pytest.fixture(scope="module")
def made():
    return make_scenes("train", 12, seed=3)


def test_of_each_scene_the_same_told_three_ways(made):
    assert made.images.shape == (12, 64, 64, 3) and made.images.dtype == np.uint8
    assert made.labels.shape == (12, 64, 64) and made.labels.dtype == np.uint8
    for labels, found in zip(made.labels, made.instances):
        assert 1 <= len(found.labels) <= scenes.COUNT[1]
        assert found.masks.sum(0).max() == 1  # no pixel is in two
        told = np.zeros_like(labels)
        for mask, label, box in zip(found.masks, found.labels, found.boxes):
            y, x = np.nonzero(mask)
            told[y, x] = label
            assert 1 <= label <= 10
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        np.testing.assert_array_equal(told, labels)
    assert any(len(found.labels) > 2 for found in made.instances)


def test_a_scene_depends_on_seed_split_and_number_alone(made):
    fewer = make_scenes("train", 3, seed=3)
    np.testing.assert_array_equal(fewer.images, made.images[:3])
    for other in (make_scenes("train", 3, seed=4), make_scenes("test", 3, seed=3)):
        assert (fewer.images != other.images).any((1, 2, 3)).all()


def test_masks_lie_where_the_strokes_are(monkeypatch):
    """One digit a scene, without noise: against the same scene without the digit."""
    for name, value in (("NOISE", 0.0), ("GAIN", 0.0), ("COUNT", (1, 1))):
        monkeypatch.setattr(scenes, name, value)
    drawn = make_scenes("test", 4)
    monkeypatch.setattr(scenes, "COUNT", (0, 0))
    empty = make_scenes("test", 4)
    assert not empty.labels.any() and not empty.instances[0].labels.size
    assert empty.instances[0].boxes.shape == (0, 4)
    changes = np.abs(np.float64(drawn.images) - empty.images).max(-1)
    for change, mask in zip(changes, drawn.labels > 0):
        assert change[mask].min() > 0
        assert change[mask].mean() > 5 * change[~mask].mean()


def test_a_split_draws_its_own_digits_alone(monkeypatch):
    digits = load_dataset("digits")
    told = digits._replace(
        train=digits.train._replace(labels=np.full_like(digits.train.labels, 3)),
        test=digits.test._replace(labels=np.full_like(digits.test.labels, 7)),
    )
    monkeypatch.setattr(scenes, "load_dataset", lambda name: told)
    for split, label in (("train", 4), ("test", 8)):
        assert np.unique(make_scenes(split, 3).labels).tolist() == [0, label]


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"'val'; expected one of .'train', 'test'"):
        make_scenes("val", 1)
    with pytest.raises(ValueError, match="size is 42; expected 43 or more"):
        make_scenes("train", 1, 42)
    nothing = make_scenes("train", 0)
    assert nothing.images.shape == (0, 64, 64, 3) and nothing.instances == ()
