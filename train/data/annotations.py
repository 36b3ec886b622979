"""Annotations in COCO's form: read, and refused where they cannot be meant."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle_masks

from train.data.objects import Categories

#: names that a message shows
_SHOWN = 5
#: a polygon of fewer numbers has no area
_LEAST_NUMBERS = 6
_LISTS = ("images", "annotations", "categories")


class Annotations(NamedTuple):
    """What a file of annotations says.

    Attributes:
        images: as the file has them, by id.
        objects: the annotations of each image, by its id: they have bbox, area, iscrowd
            and a segmentation that pycocotools can read.
        categories: of all annotations, sorted by id.
        maskless: how many annotations were left out, whose segmentation is empty.
        digest: SHA-256 of the file.
    """

    images: dict[int, dict[str, Any]]
    objects: dict[int, list[dict[str, Any]]]
    categories: Categories
    maskless: int
    digest: str

    def truth(self, ids: Iterable[int]) -> dict[str, Any]:
        """Returns some of the images with their annotations, in COCO's form."""
        ids = list(ids)
        annotations = [each for i in ids for each in self.objects[i]]
        return {
            "images": [
                {key: self.images[i][key] for key in ("id", "height", "width")}
                for i in ids
            ],
            # from 1: to pycocotools the id 0 means that nothing was matched
            "annotations": [
                each | {"id": number} for number, each in enumerate(annotations, 1)
            ],
            "categories": self.categories.in_coco(),
        }


def read_annotations(path: pathlib.Path) -> Annotations:
    """Reads a file such as ``instances_train2017.json``.

    Polygons of fewer than six numbers are left out, and annotations that have no mask
    then.

    Raises:
        ValueError: it is no such file, or says what cannot be; the message names the
            file and the annotations.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Unpack it again.") from error
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), list) for name in _LISTS
    ):
        raise ValueError(
            f"{path} is not in COCO's form; expected lists {', '.join(_LISTS)}."
        )
    try:
        return _checked(path, content, hashlib.sha256(data).hexdigest())
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not in COCO's form: an entry lacks or has a bad {error}."
        ) from error


def _checked(path: pathlib.Path, content: dict[str, Any], digest: str) -> Annotations:
    images = _by_id(path, "images", content)
    categories = _by_id(path, "categories", content)
    annotations = content["annotations"]
    for what, names in {
        "images without height and width": (
            image["file_name"]
            for image in images.values()
            if not (_is_size(image["height"]) and _is_size(image["width"]))
        ),
        "annotations of images that it does not have": (
            f"{each['id']} of image {each['image_id']}"
            for each in annotations
            if each["image_id"] not in images
        ),
        "annotations of categories that it does not have": (
            f"{each['id']} of category {each['category_id']}"
            for each in annotations
            if each["category_id"] not in categories
        ),
        "annotations without a bbox of four numbers": (
            str(each["id"]) for each in annotations if not _is_box(each["bbox"])
        ),
        "annotations whose mask is not as large as the image": (
            str(each["id"])
            for each in annotations
            if not _fits(each["segmentation"], images[each["image_id"]])
        ),
    }.items():
        refuse(path, what, names)
    if not categories:
        raise ValueError(f"{path} has no categories; expected one or more.")
    objects: dict[int, list[dict[str, Any]]] = {i: [] for i in images}
    maskless = 0
    for each in annotations:
        segmentation = _cleaned(each["segmentation"])
        maskless += not segmentation
        if segmentation:
            objects[each["image_id"]].append(
                {
                    "image_id": each["image_id"],
                    "category_id": each["category_id"],
                    "bbox": each["bbox"],
                    "area": each.get("area", each["bbox"][2] * each["bbox"][3]),
                    "iscrowd": each.get("iscrowd", 0),
                    "segmentation": segmentation,
                }
            )
    ids = tuple(sorted(categories))
    names = tuple(str(categories[i]["name"]) for i in ids)
    return Annotations(images, objects, Categories(ids, names), maskless, digest)


def refuse(path: pathlib.Path, what: str, names: Iterable[str]) -> None:
    """Refuses what there are any of: "`path` has 7 `what`: `names` and 2 more".

    Raises:
        ValueError: there are.
    """
    if names := list(names):
        more = f" and {len(names) - _SHOWN:,} more" if names[_SHOWN:] else ""
        raise ValueError(
            f"{path} has {len(names):,} {what}: {', '.join(names[:_SHOWN])}{more}."
        )


def _by_id(
    path: pathlib.Path, kind: str, content: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    twice = [
        str(e["id"]) for e in content[kind] if found.setdefault(e["id"], e) is not e
    ]
    refuse(path, f"ids of {kind} twice", twice)
    refuse(path, f"ids of {kind} that are no whole numbers", _no_ids(found))
    return found


def _no_ids(found: Iterable[Any]) -> list[str]:
    return [repr(i) for i in found if not isinstance(i, int)]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(x, int | float) and math.isfinite(x) for x in box)
    )


def _fits(segmentation: Any, image: dict[str, Any]) -> bool:
    """Whether a run-length encoding is one of the image; polygons always are."""
    if isinstance(segmentation, list):
        return True
    height, width = segmentation["size"]
    counts = segmentation["counts"]
    return (height, width) == (image["height"], image["width"]) and (
        isinstance(counts, str) or sum(counts) == height * width
    )


def _cleaned(segmentation: Any) -> Any:
    """Returns it without the polygons that have no area."""
    if isinstance(segmentation, list):
        return [p for p in segmentation if len(p) >= _LEAST_NUMBERS]
    return segmentation


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Returns the mask of an annotation, ``[height, width]`` uint8, 0 or 1."""
    if isinstance(segmentation, list):
        parts: Sequence[Any] = rle_masks.frPyObjects(segmentation, height, width)
        return rle_masks.decode(rle_masks.merge(parts))
    if isinstance(segmentation["counts"], list):
        segmentation = rle_masks.frPyObjects(segmentation, height, width)
    return rle_masks.decode(segmentation)


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Returns a mask ``[height, width]``, of bool or of 0 and 1, as JSON can hold it,
    run-length encoded."""
    found: Any = rle_masks.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}
