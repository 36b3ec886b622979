"""Reading a COCO directory, against pycocotools; and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from tests.train.data.coco_files import annotation, make_coco, triangle, write
from train.data.check import Group, check_files
from train.data.coco import MASK_SIZE, SLOTS, load_coco
from train.data.objects import Scale, crop_mask, make_bucket_batches

SCALE = Scale(32, 56, 16)


@pytest.fixture
def root(tmp_path):
    return make_coco(tmp_path)


def load(root, split="train"):
    return load_coco(root, split, (SCALE, SCALE))


def where(split, image_id):
    return int(np.flatnonzero(split.pictures.ids == image_id)[0])


def read(split, image_id):
    """What is read of one image, without the axis of examples."""
    found = split.read(np.array([where(split, image_id)]))
    return type(found)(*(array[0] for array in found))


def test_what_is_there(root):
    data, summary = load(root)
    assert data.categories == ((3, 17, 90), ("cat", "dog", "kite"))
    assert data.train.pictures.ids.tolist() == [11, 12, 13, 14]
    assert summary.splitlines() == [
        f"{root}/train2017: 5 images, 5 objects of 3 classes, 1 crowds, which are"
        " ignored, 1 too small or too many to learn, 1 left out, without a mask; 4"
        " images to train on have objects",
        f"{root}/val2017: 2 images, 2 objects of 3 classes",
    ]
    assert data.train.describe()["by_class"] == [2, 1, 2]
    assert len(data.test.truth["annotations"]) == 2
    assert len(data.train.take(1).truth["annotations"]) == 3  # with the crowd


@pytest.mark.parametrize(
    "image_id, size, canvas",
    [
        (11, (32, 48), (32, 64)),
        (12, (48, 32), (64, 32)),
        (13, (32, 32), (32, 64)),
        (14, (26, 56), (32, 64)),  # else it would be longer than 56
    ],
)
def test_sizes(root, image_id, size, canvas):
    data, _ = load(root)
    found = read(data.train, image_id)
    assert found.image.shape == (*canvas, 3) and found.image.dtype == np.uint8
    assert tuple(found.size) == size
    height, width = size
    assert not found.image[height:].any() and not found.image[:, width:].any()
    with Image.open(data.train.root / f"{image_id:05}.png") as image:
        grey = image.mode == "L"
        resized = image.convert("RGB").resize((width, height), Image.BILINEAR)
    np.testing.assert_array_equal(found.image[:height, :width], resized)
    assert grey == (image_id == 14)


def test_objects_of_an_image(root):
    data, _ = load(root)
    found = read(data.train, 11)
    assert found.labels.shape == (SLOTS,) and found.masks.shape[1:] == (MASK_SIZE,) * 2
    assert found.labels[:4].tolist() == [3, 1, 2, 0]
    assert found.crowd[:4].tolist() == [False, False, True, False]
    # 60 x 40 became 48 x 32
    expected = np.array([[10, 4, 40, 34], [30.5, 10.25, 50.5, 30.25], [0, 20, 60, 40]])
    np.testing.assert_allclose(found.boxes[:3], 0.8 * expected, rtol=1e-6)
    assert not found.boxes[3:].any() and not found.masks[2:].any()
    clipped = read(data.train, 14)
    np.testing.assert_allclose(
        clipped.boxes[0], np.array([50, 5, 64, 25]) * ([56 / 64, 26 / 30] * 2)
    )


@pytest.mark.parametrize("image_id", [11, 13, 14])
def test_masks_are_those_of_pycocotools(root, image_id):
    data, _ = load(root)
    found = read(data.train, image_id)
    coco = COCO(root / "annotations/instances_train2017.json")
    objects = [
        each
        for each in coco.imgToAnns[image_id]
        if not each["iscrowd"] and each["area"] > 2
    ]
    objects = [o for o in objects if max(map(len, o["segmentation"])) >= 6]
    for each in objects:  # four numbers are a box to pycocotools
        each["segmentation"] = [p for p in each["segmentation"] if len(p) >= 6]
    for slot, each in enumerate(objects):
        mask = coco.annToMask(each)
        height, width = mask.shape
        x, y, w, h = each["bbox"]
        x2, y2 = min(x + w, width), min(y + h, height)
        # the pixel of the mask below the centre of each cell
        at = (np.arange(MASK_SIZE) + 0.5) / MASK_SIZE
        rows, columns = (y + at * (y2 - y)).astype(int), (x + at * (x2 - x)).astype(int)
        near = mask[np.ix_(rows, columns)]
        soft = found.masks[slot] / 255
        assert np.mean((soft > 0.5) == near) > 0.97
        assert soft.mean() == pytest.approx(near.mean(), abs=0.02)
        assert 0.4 < near.mean() < 0.75  # a triangle's half of its box


def test_a_mask_in_a_box():
    """Its cells have the share of the mask that is in them."""
    mask = np.zeros((8, 12), np.uint8)
    mask[2:6, 4:8] = 1
    assert (crop_mask(mask, np.array([4, 2, 8, 6]), 6) == 255).all()
    half = crop_mask(mask, np.array([0.0, 2, 8, 6]), 2)
    np.testing.assert_allclose(half.mean(0), [32, 223], atol=32)
    np.testing.assert_array_equal(
        crop_mask(mask[:, ::-1], np.array([2.5, 1, 9, 7]), 9),
        crop_mask(mask, np.array([3, 1, 9.5, 7]), 9)[:, ::-1],
    )


@pytest.mark.parametrize("portraits, batch", [(4, 2), (3, 4), (0, 3), (10, 5), (1, 4)])
def test_batches_are_of_one_kind_and_none_is_left_out(portraits, batch):
    portrait = np.arange(10) % 10 < portraits
    batches = make_bucket_batches(portrait, batch, seed=1)
    steps = 60
    found = [batches(step) for step in range(steps)]
    counts = np.bincount(np.concatenate(found), minlength=10)
    assert all(len(np.unique(portrait[index])) == 1 for index in found)
    assert all(index.shape == (batch,) for index in found)
    assert np.ptp(counts) <= batch  # of 6 epochs per example of a batch
    for kind in (portrait, ~portrait):
        stream = [i for index in found if kind[index[0]] for i in index]
        members = set(np.flatnonzero(kind).tolist())
        for start in range(0, len(stream) - len(members), max(1, len(members))):
            assert set(stream[start : start + len(members)]) == members
    np.testing.assert_array_equal(batches(7), found[7])
    other = make_bucket_batches(portrait, batch, seed=2)
    assert any((other(i) != found[i]).any() for i in range(8))


def test_directories_that_are_not_there(tmp_path, root):
    with pytest.raises(
        FileNotFoundError, match=r"(?s)no annotations/inst.*18 GB.*1 GB"
    ):
        load(tmp_path / "nowhere")
    (root / "train2017/00013.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 images missing .*: 00013.png. Down"
    ):
        load(root)
    data, _ = load(root, "val")
    assert data.train.pictures.ids.tolist() == [21, 22]


def change(root, **changes):
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for name, change in changes.items():
        change(content[name])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(annotations=lambda a: a[0].update(image_id=99)),
            "1 annotations of images that it does not have: 0 of image 99",
        ),
        (
            dict(annotations=lambda a: [e.update(category_id=1) for e in a]),
            "8 annotations of categories .*: 0 of category 1, .* and 3 more",
        ),
        (dict(annotations=lambda a: a[3].update(bbox=[0, 1, 2])), "bbox of four .*: 3"),
        (
            dict(annotations=lambda a: a[2]["segmentation"].update(size=[4, 4])),
            "mask is not as large as the image: 2",
        ),
        (dict(annotations=lambda a: a[1].pop("bbox")), "an entry lacks .*'bbox'"),
        (dict(images=lambda i: i[1].update(id=11)), "1 ids of images twice: 11"),
        (dict(images=lambda i: i[0].update(width=0)), "height and width: 00011.png"),
        (dict(categories=lambda c: c.pop()), "of categories that it does not have"),
        (
            dict(categories=lambda c: c[0].update(name="cow")),
            "other categories: 3 .3 'cow'.* and 3 .3 'cat'",
        ),
        (dict(annotations=lambda a: a.clear()), "no image in .* has an object to lear"),
    ],
)
def test_annotations_that_cannot_be_meant(root, changes, message):
    change(root, **changes)
    with pytest.raises(ValueError, match=message):
        load(root)


def test_damaged_files_are_named(root):
    data, _ = load(root)
    path = root / "train2017/00012.png"
    path.write_bytes(path.read_bytes()[:-60])
    group = Group("train", data.train.root, [row.file for row in data.train.rows])
    with pytest.raises(ValueError, match=r"1 of 4 image files.*\n.*00012.png"):
        check_files([group], 10**6)
    with pytest.raises(ValueError, match=r"image .*00012.png cannot be used"):
        read(data.train, 12)
    Image.new("RGB", (40, 61)).save(path)
    with pytest.raises(
        ValueError, match=r"00012.png .*is 40 x 61, but is to be 40 x 60"
    ):
        read(data.train, 12)
    (root / "annotations/instances_val2017.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances_val2017.json is damaged"):
        load(root)


def test_the_largest_objects_have_slots(root):
    sides = 3 + np.arange(SLOTS + 5) / 10
    found = [annotation(11, 3, triangle(1, 1, float(side))) for side in sides]
    write(root, "train", {11: (60, 40)}, found)
    data, summary = load(root)
    widths = read(data.train, 11).boxes[:, 2] / 0.8 - 1
    np.testing.assert_allclose(widths, sides[5:], rtol=1e-5)
    assert "100 objects of 3 classes, 5 too small or too many" in summary
