"""How good detections are: the twelve numbers of COCO, by pycocotools.

Detections are those of `kalman_flax.models.detection`: on canvases, with a mask for
each box. Here they go back to the image as it came.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kalman_flax.models.detection.recipe import Detections
from train.data.annotations import encode

#: a mask's probability, beyond which a pixel is of the object
THRESHOLD = 0.5
#: COCO's numbers, in the order in which COCOeval has them
NUMBERS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
)


def results(
    found: Detections,
    image_id: int,
    original: Sequence[int],
    size: Sequence[int],
    category_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """Returns the detections on an image as COCO has them: on the image as it came.

    Args:
        found: on the canvas, without an axis of images.
        image_id: of the image.
        original: its height and width as it came.
        size: height and width on the canvas.
        category_ids: of the labels 1, 2 and so on.

    Returns:
        For each a dict with image_id, category_id, bbox, score, segmentation, area (of
        the mask) as JSON can hold it. Nothing is rounded.
    """
    height, width = map(int, original)
    factors = np.array([width / size[1], height / size[0]] * 2)
    annotations = []
    boxes, labels, masks = map(np.asarray, (found.boxes, found.labels, found.masks))
    for slot in np.flatnonzero(labels).tolist():
        box = boxes[slot].astype(np.float64) * factors
        mask = paste(masks[slot], box, height, width)
        x1, y1, x2, y2 = box.tolist()
        annotations.append(
            {
                "image_id": int(image_id),
                "category_id": category_ids[labels[slot] - 1],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(found.scores[slot]),
                "segmentation": encode(mask),
                "area": int(mask.sum()),
            }
        )
    return annotations


def paste(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the mask of a box on the whole image, ``[height, width]`` bool.

    A pixel is of the object if its centre lies in the box and the probability there,
    bilinear between the centres of the cells, is more than `THRESHOLD`.

    Args:
        mask: ``[m, m]`` probabilities.
        box: x1, y1, x2, y2 in pixels of the image.
        height, width: of the image.
    """
    x1, y1, x2, y2 = box.tolist()
    rows, down = _weights(y1, y2, height, mask.shape[0])
    columns, across = _weights(x1, x2, width, mask.shape[1])
    pasted = np.zeros((height, width), bool)
    pasted[rows, columns] = down @ mask @ across.T > THRESHOLD
    return pasted


def _weights(start: float, end: float, length: int, cells: int) -> tuple[slice, Any]:
    """The pixels whose centres lie between start and end, and how much each takes of
    the cells there, ``[pixels, cells]``."""
    low, high = np.clip(np.ceil(np.array([start, end]) - 0.5), 0, length).astype(int)
    centres = np.arange(low, max(low, high)) + 0.5
    place = (centres - start) / max(end - start, 1e-9) * cells - 0.5
    distance = np.abs(np.clip(place, 0, cells - 1)[:, None] - np.arange(cells))
    return slice(low, max(low, high)), np.maximum(0, 1 - distance)


def score(
    truth: dict[str, Any], found: Iterable[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Returns COCO's numbers of detections, for ``"box"`` and for ``"mask"``.

    Args:
        truth: images, annotations and categories, see
            `train.data.objects.ObjectSource`.
        found: of `results`, on all images of `truth`.

    Returns:
        The numbers of `NUMBERS`, from 0 to 1. One that asks for objects of a size that
        `truth` has none of is not there.
    """
    found = list(found)
    with _silent():
        index = _indexed(truth)
        return {
            "box": _numbers(index, truth, found, "bbox"),
            "mask": _numbers(index, truth, found, "segm"),
        }


def _numbers(
    truth: COCO,
    dataset: dict[str, Any],
    found: list[dict[str, Any]],
    kind: Literal["bbox", "segm"],
) -> dict[str, float]:
    annotations = [
        each
        | {"id": number, "iscrowd": 0}
        | ({"area": each["bbox"][2] * each["bbox"][3]} if kind == "bbox" else {})
        for number, each in enumerate(found, 1)
    ]
    evaluation = COCOeval(truth, _indexed(dataset | {"annotations": annotations}), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    numbers = zip(NUMBERS, evaluation.stats.tolist())
    return {name: number for name, number in numbers if number >= 0}


def _indexed(dataset: Any) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """pycocotools tells of each step on standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
