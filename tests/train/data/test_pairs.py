"""Folders of images and masks: read together, cropped together, and what is refused."""

import jax
import numpy as np
import pytest
from PIL import Image

from train.data.pairs import check_pairs, find_pairs
from train.data.segment_sets import load_segments
from train.data.segments import IGNORE

SIZE = 16


def put(root, split, stem, labels, image=None, kind="L"):
    """A mask, and an image whose red is 50 times the label."""
    labels = np.uint8(labels)
    red = np.where(labels == IGNORE, 0, 50 * labels).astype(np.uint8)
    pixels = np.stack([red, red * 0, red * 0], -1) if image is None else image
    for name, array, end in (("images", pixels, "png"), ("masks", labels, "png")):
        (root / split / name).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(array)
        if name == "masks" and kind == "P":
            picture = picture.convert("P")
            picture.putdata(labels.ravel().tolist())
        picture.save(root / split / name / f"{stem}.{end}")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\n")
    halves = np.zeros((20, 40), np.uint8)
    halves[:, 20:] = 2
    for number in range(3):
        put(tmp_path, "train", f"a{number}", np.where(halves, number, 1))
    ignored = halves.copy()
    ignored[:10] = IGNORE
    put(tmp_path, "val", "b", ignored, kind="P")
    return tmp_path


def find(root):
    return find_pairs(root, SIZE, 10_000)


def test_whole_to_test_and_crops_to_train(root):
    train, test, classes, name = find(root)
    assert classes == ("sky", "sea", "land") and name == "val"
    assert check_pairs((train, test)).keys() == {"train", "val"}
    whole = test.read(np.array([0]))
    # 40 x 20 pixels on a square of 16: half of it below, that counts nowhere.
    expected = np.full((SIZE, SIZE), IGNORE)
    expected[4:8, :8], expected[4:8, 8:] = 0, 2
    np.testing.assert_array_equal(whole.labels[0], expected)
    assert not whole.images[0, 8:].any() and (whole.images[0, 6:8, 9:, 0] == 100).all()

    index = np.array([0, 1, 2, 0])
    crops, again = (train.read(index, key=(0, 1)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, crops, again)
    assert (crops.labels != train.read(index, key=(0, 2)).labels).any()
    # Away from an edge, red is 50 times the label: they are cut at one place.
    gap = np.abs(crops.images[..., 0] - 50.0 * crops.labels)
    assert crops.labels.shape == (4, SIZE, SIZE) and (gap > 1).mean() < 0.1
    np.testing.assert_array_equal(crops.labels[0], crops.labels[3])


def test_as_a_data_set(root):
    data = load_segments("pairs", str(root), SIZE, (2, 0), 10_000)
    assert (data.train.examples, data.test.examples) == (2, 1)
    assert data.num_classes == 3 and data.test.image_shape == (SIZE, SIZE, 3)
    described = data.train.describe()
    assert described["images"] == 2
    (root / "train/images/a0.png").rename(root / "train/images/c.png")
    (root / "train/masks/a0.png").rename(root / "train/masks/c.png")
    moved = load_segments("pairs", str(root), SIZE, (0, 0), 10_000)
    assert moved.train.describe()["sha256"] != described["sha256"]


def test_what_was_found_good_is_not_opened_again(root):
    splits = find(root)[:2]
    checked = check_pairs(splits)
    path = root / "val/masks/b.png"
    path.write_bytes(path.read_bytes()[:60])
    assert check_pairs(splits, checked) == checked  # of the time of the scan
    with pytest.raises(ValueError, match=r"1 pairs .*\n.*b.png cannot be decoded"):
        check_pairs(find(root)[:2], checked)


def broken_mask(root, array):
    Image.fromarray(array).save(root / "train/masks/a1.png")
    check_pairs(find(root)[:2])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda r: (r / "train/masks/a1.png").unlink(), "without masks .*: images/a1"),
        (lambda r: (r / "val/images/b.png").unlink(), "without images .*: masks/b.png"),
        (
            lambda r: (r / "classes.txt").write_text("a\n"),
            "1 names of classes, 1 of",
        ),
        (lambda r: (r / "classes.txt").write_text("a\na\nb"), "3 names .*, 2 of them"),
        (
            lambda r: (r / "train/images/a1.jpg").write_bytes(b""),
            "two files a1: images/a1.jpg and images/a1.png",
        ),
        (
            lambda r: broken_mask(r, np.zeros((20, 39), np.uint8)),
            "a1.png is 39 x 20 pixels, its image 40 x 20",
        ),
        (
            lambda r: broken_mask(r, np.full((20, 40), 3, np.uint8)),
            r"a1.png has labels 3; expected 0 to 2, of the 3 classes",
        ),
        (
            lambda r: broken_mask(r, np.zeros((20, 40, 3), np.uint8)),
            "a1.png has colours of the kind RGB; expected one number a pixel",
        ),
    ],
)
def test_what_cannot_be_meant(root, damage, message):
    with pytest.raises(ValueError, match=message):
        damage(root)
        find(root)


def test_what_is_missing(root):
    (root / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match="expected the names of the classes"):
        find(root)
    with pytest.raises(FileNotFoundError, match="expected the folders train and val"):
        find(root / "train")
