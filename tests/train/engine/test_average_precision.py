"""COCO's numbers: of the truth itself, of random detections against a matcher of our
own, and of masks that go from a box to an image."""

import json

import numpy as np
import pytest
from pycocotools import mask as rle_masks

from kalman_flax.models.detection.recipe import Detections
from tests.train.data.coco_files import make_coco
from train.data.annotations import decode
from train.data.coco import load_coco
from train.data.objects import Scale
from train.data.scene_objects import load_scenes
from train.engine.average_precision import NUMBERS, paste, results, score


def truth_as_detections(source, category_ids):
    """The objects of the examples, read, pasted, written to JSON and read again."""
    found = []
    for example in range(source.examples):
        objects = source.read(np.array([example]))
        ids, original, size, _ = (each[example] for each in source.pictures)
        labels = np.where(objects.crowd[0], 0, objects.labels[0])
        detections = Detections(
            objects.boxes[0], np.ones(len(labels)), labels, objects.masks[0] / 255
        )
        found += results(detections, ids, original, size, category_ids)
    return json.loads(json.dumps(found))


@pytest.mark.parametrize("scale", [Scale(32, 56, 16), Scale(90, 200, 1)])
def test_the_truth_of_a_directory_is_found(tmp_path, scale, capsys):
    data, _ = load_coco(make_coco(tmp_path), "train", (scale, scale))
    found = truth_as_detections(data.train, data.categories.ids)
    truth = data.train.truth
    # one was too small to learn
    there = [each for each in truth["annotations"] if each["area"] > 2]
    for each in there:
        if each["image_id"] == 14:  # it hangs over the edge
            each["bbox"] = [50, 5, 14, 20]
    numbers = score(truth | {"annotations": there}, found)
    assert numbers["box"]["AP"] == pytest.approx(1, abs=1e-12)
    assert numbers["mask"]["AP"] > 0.9 and numbers["mask"]["AP75"] == 1
    large = {name for name in NUMBERS if name.endswith(("_medium", "_large"))}
    assert numbers["box"].keys() == set(NUMBERS) - large  # as there are none
    assert capsys.readouterr().out == ""


def test_the_truth_of_scenes_is_found():
    data = load_scenes((4, 4), 64)
    found = truth_as_detections(data.test, data.categories.ids)
    numbers = score(data.test.truth, found)
    assert numbers["box"]["AP"] == pytest.approx(1, abs=1e-12)
    assert numbers["mask"]["AP"] > 0.8
    half = [dict(each, category_id=1) for each in found]
    assert score(data.test.truth, half)["box"]["AP"] < 0.2


def test_nothing_found_is_zero():
    data = load_scenes((4, 4), 64)
    numbers = score(data.test.truth, [])
    assert numbers["box"]["AP"] == numbers["mask"]["AR100"] == 0


def test_paste_against_a_loop():
    """Bilinear between the centres of the cells, level beyond the last of them."""
    random = np.random.default_rng(0)
    mask = random.uniform(size=(5, 5))
    box = np.array([2.3, -1.2, 17.8, 9.9])
    pasted = paste(mask, box, 12, 16)
    for i, j in np.ndindex(12, 16):
        v = (i + 0.5 - box[1]) / (box[3] - box[1]) * 5 - 0.5
        u = (j + 0.5 - box[0]) / (box[2] - box[0]) * 5 - 0.5
        inside = -0.5 <= v < 4.5 and -0.5 <= u < 4.5
        v, u = np.clip([v, u], 0, 4)
        a, b = int(min(v, 3)), int(min(u, 3))
        v, u = v - a, u - b
        here = (1 - v) * ((1 - u) * mask[a, b] + u * mask[a, b + 1])
        here += v * ((1 - u) * mask[a + 1, b] + u * mask[a + 1, b + 1])
        assert pasted[i, j] == (inside and here > 0.5), (i, j)


@pytest.mark.parametrize("box", [[3, 3, 3, 9], [-9, -9, -1, -1], [30, 2, 40, 8]])
def test_a_box_without_pixels_has_no_mask(box):
    assert not paste(np.ones((4, 4)), np.array(box, float), 20, 20).any()


def test_back_on_the_image_as_it_came():
    boxes = np.array([[16.0, 8, 48, 24], [0, 0, 9, 9]])
    found = Detections(
        boxes, np.array([0.7, 0.1]), np.array([2, 0]), np.ones((2, 4, 4))
    )
    [only] = results(found, 7, (20, 80), (40, 160), [3, 17])
    assert only["bbox"] == [8, 4, 16, 8] and only["score"] == 0.7
    assert (only["image_id"], only["category_id"], only["area"]) == (7, 17, 128)
    mask = decode(only["segmentation"], 20, 80)
    assert mask[4:12, 8:24].all() and mask.sum() == 128
    assert rle_masks.toBbox(only["segmentation"]).tolist() == only["bbox"]


def iou(a, b):
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    w = max(0.0, min(ax + aw, bx + bw) - max(ax, bx))
    h = max(0.0, min(ay + ah, by + bh) - max(ay, by))
    return w * h / (aw * ah + bw * bh - w * h)


def plain_ap(truth, found):
    """AP for boxes without crowds, from its definition: greedy by score; precision at
    101 recalls, each the best at that recall or beyond; the mean over categories and
    thresholds."""
    precisions = []
    for category in {each["category_id"] for each in truth}:
        those = [each for each in found if each["category_id"] == category]
        those.sort(key=lambda each: -each["score"])
        wanted = [each for each in truth if each["category_id"] == category]
        for threshold in np.linspace(0.5, 0.95, 10):
            taken, right = set(), []
            for each in those:
                overlaps = {
                    n: iou(each["bbox"], one["bbox"])
                    for n, one in enumerate(wanted)
                    if one["image_id"] == each["image_id"] and n not in taken
                }
                best = max(overlaps, key=overlaps.get, default=None)
                right.append(best is not None and overlaps[best] >= threshold)
                if right[-1]:
                    taken.add(best)
            hits = np.cumsum(right)
            recall = hits / len(wanted)
            precision = hits / np.arange(1, len(hits) + 1)
            precisions += [
                max(precision[recall >= at - 1e-12], default=0)
                for at in np.linspace(0, 1, 101)
            ]
    return np.mean(precisions)


def test_boxes_against_a_matcher_of_our_own():
    random = np.random.default_rng(0)

    def box():
        return [*random.uniform(0, 60, 2), *random.uniform(10, 40, 2)]

    truth, found = [], []
    for number in range(40):
        image, category = int(random.integers(4)), int(random.integers(1, 4))
        each = {"image_id": image, "category_id": category, "bbox": box()}
        mask = {"segmentation": [[0, 0, 9, 0, 9, 9]], "iscrowd": 0}
        area = each["bbox"][2] * each["bbox"][3]
        truth.append(each | mask | {"id": number + 1, "area": area})
        for _ in range(3):
            near = np.add(each["bbox"], random.normal(size=4) * 3).tolist()
            found.append(each | {"bbox": near, "score": float(random.uniform())})
        found.append(each | {"bbox": box(), "score": float(random.uniform())})
    rle = rle_masks.encode(np.ones((100, 100), np.uint8, order="F"))
    found = [each | {"segmentation": rle, "area": 1} for each in found]
    dataset = {
        "images": [{"id": i, "height": 100, "width": 100} for i in range(4)],
        "annotations": truth,
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)],
    }
    expected = plain_ap(truth, found)
    assert 0.1 < expected < 0.9
    assert score(dataset, found)["box"]["AP"] == pytest.approx(expected, abs=1e-6)
