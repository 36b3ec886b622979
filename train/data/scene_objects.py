"""Digit scenes as a detector takes them, see `train.data.scenes`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.data.annotations import encode
from train.data.digest import sha256
from train.data.objects import (
    Canvases,
    Categories,
    ObjectData,
    Objects,
    ObjectSource,
    Pictures,
    crop_mask,
)
from train.data.scenes import CLASSES, COUNT, SPLITS, Scenes, make_scenes

#: slots for the digits of a scene
SLOTS = 8
assert COUNT[1] <= SLOTS
#: side of the masks that are kept of their boxes
MASK_SIZE = 28
#: scenes to train and to test on, where a config asks for no number
EXAMPLES = 1_500, 300
#: the digits; the background is no object
CATEGORIES = Categories(tuple(range(1, len(CLASSES))), CLASSES[1:])


@dataclasses.dataclass(frozen=True)
class SceneSplit(ObjectSource):
    """Scenes in memory.

    Attributes:
        scenes: what they were made of.
        objects: the same, as a detector takes it.
    """

    scenes: Scenes
    objects: Objects[np.ndarray]

    @property
    def examples(self) -> int:
        """Number of scenes."""
        return len(self.objects.image)

    @functools.cached_property
    def pictures(self) -> Pictures:
        """What is known of all scenes: they are as large as their canvases."""
        size = self.objects.size
        return Pictures(np.arange(self.examples), size, size, size)

    @property
    def truth(self) -> dict[str, Any]:
        """Images, annotations and categories in COCO's form."""
        annotations = []
        for image_id, found in enumerate(self.scenes.instances):
            for box, label, mask in zip(found.boxes, found.labels, found.masks):
                x1, y1, x2, y2 = box.tolist()
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": int(label),
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": int(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": encode(mask),
                    }
                )
        images = [
            {"id": i, "height": int(height), "width": int(width)}
            for i, (height, width) in enumerate(self.objects.size)
        ]
        return {
            "images": images,
            "annotations": annotations,
            "categories": CATEGORIES.in_coco(),
        }

    def describe(self) -> dict[str, Any]:
        """Returns what to know the split by, see `train.data.fingerprint`."""
        counts = np.bincount(self.objects.labels.ravel(), minlength=len(CLASSES))
        return {
            "images": self.examples,
            "shape": list(self.objects.image.shape[1:]),
            "dtype": "uint8",
            "by_class": counts[1:].tolist(),
            "sha256": sha256(self.objects),
        }

    def read(
        self, index: np.ndarray, key: Sequence[int] | None = None
    ) -> Objects[np.ndarray]:
        """Returns the examples `index`."""
        return Objects(*(array[index] for array in self.objects))

    def read_canvases(self, index: np.ndarray) -> Canvases[np.ndarray]:
        """Returns the images of these examples alone."""
        return Canvases(*(array[index] for array in self.objects.canvases))


def load_scenes(examples: tuple[int, int], size: int) -> ObjectData[SceneSplit]:
    """Makes scenes to train and to test on.

    Args:
        examples: their numbers; 0 for those of `EXAMPLES`.
        size: height and width, in pixels.
    """
    train, test = (
        _split(make_scenes(split, count or default, size))
        for split, count, default in zip(SPLITS, examples, EXAMPLES)
    )
    return ObjectData(train, test, CATEGORIES)


def _split(scenes: Scenes) -> SceneSplit:
    count, height, width = scenes.images.shape[:3]
    size = np.tile(np.array([height, width], np.int32), (count, 1))
    objects = Objects.on(Canvases(scenes.images, size), SLOTS, MASK_SIZE)
    for row, found in enumerate(scenes.instances):
        there = len(found.labels)
        objects.boxes[row, :there] = found.boxes
        objects.labels[row, :there] = found.labels
        for slot, (mask, box) in enumerate(zip(found.masks, found.boxes)):
            objects.masks[row, slot] = crop_mask(mask, box, MASK_SIZE)
    return SceneSplit(scenes, objects)
