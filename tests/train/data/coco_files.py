"""A small directory of COCO's form: three categories with gaps between their ids."""

import json

import numpy as np
from PIL import Image

from train.data.annotations import encode

CATEGORIES = [(3, "cat"), (17, "dog"), (90, "kite")]


def annotation(image_id, category_id, polygons, **more):
    """Of polygons; its bbox is around the first."""
    x, y = np.reshape(polygons[0], (-1, 2)).T
    bbox = [x.min(), y.min(), np.ptp(x), np.ptp(y)]
    return {
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": polygons,
        "bbox": [float(value) for value in bbox],
        "area": float(bbox[2] * bbox[3] / 2),
        "iscrowd": 0,
    } | more


def triangle(x, y, side):
    return [[x, y, x + side, y, x, y + side]]


def crowd(image_id, category_id, height, width):
    """The lower half of the image."""
    mask = np.arange(height)[:, None] >= height // 2
    return {
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": encode(np.broadcast_to(mask, (height, width))),
        "bbox": [0, height // 2, width, height - height // 2],
        "area": width * (height - height // 2),
        "iscrowd": 1,
    }


def annotations(split):
    """Images by id as (width, height), and their annotations."""
    images = {11: (60, 40), 12: (40, 60), 13: (50, 50), 14: (64, 30), 15: (33, 47)}
    if split == "val":
        images = {21: (60, 40), 22: (40, 60)}
        return images, [
            annotation(21, 17, triangle(5, 5, 20)),
            annotation(22, 3, triangle(10, 20, 25)),
        ]
    return images, [
        annotation(11, 90, triangle(10, 4, 30)),
        annotation(11, 3, triangle(30.5, 10.25, 20)),
        crowd(11, 17, 40, 60),
        annotation(12, 17, triangle(2, 30, 29)),
        # pycocotools would take the first four numbers for a box
        annotation(
            13,
            3,
            [[1, 1, 20, 1], *triangle(5, 5, 40)],
            bbox=[5, 5, 40, 40],
            area=800,
        ),
        annotation(13, 3, [[1, 1, 9, 9]]),  # no area
        annotation(13, 17, triangle(3, 3, 1.5), area=1.1),  # too small
        # beyond the right edge; 14 is grey, 15 is empty
        annotation(14, 90, triangle(50, 5, 20)),
    ]


def write(root, split, images, found, categories=CATEGORIES):
    """Writes a split; images whose id is a multiple of 7 are grey."""
    folder = root / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for i, (width, height) in images.items():
        pixels = np.random.default_rng(i).integers(0, 255, (height, width, 3))
        image = Image.fromarray(pixels.astype(np.uint8))
        image.convert("L" if i % 7 == 0 else "RGB").save(folder / f"{i:05}.png")
    content = {
        "images": [
            {"id": i, "file_name": f"{i:05}.png", "width": w, "height": h}
            for i, (w, h) in images.items()
        ],
        "annotations": [each | {"id": n} for n, each in enumerate(found)],
        "categories": [{"id": i, "name": name} for i, name in categories],
    }
    path = root / "annotations" / f"instances_{split}2017.json"
    path.write_text(json.dumps(content))


def make_coco(root):
    """Writes both splits into `root`."""
    for split in ("train", "val"):
        write(root, split, *annotations(split))
    return root
