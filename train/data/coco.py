"""A directory of COCO's form: images on disk, their objects in a JSON file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from train.data.annotations import Annotations, decode, read_annotations, refuse
from train.data.batches import first
from train.data.files import Found
from train.data.objects import (
    Canvases,
    Categories,
    ObjectData,
    Objects,
    ObjectSource,
    Pictures,
    Scale,
    crop_mask,
    pictures_of,
)
from train.data.pixels import MAX_PIXELS

SPLITS = ("train", "val")
#: slots for the objects of an image; COCO has no image with more
SLOTS = 100
#: side of the masks that are kept of their boxes
MASK_SIZE = 112
#: smaller boxes, clipped to the image, and smaller masks, in pixels, teach nothing
LEAST_BOX, LEAST_MASK = 4, 1

_DOWNLOAD = (
    "Download COCO 2017 once, from https://cocodataset.org/#download:"
    " train2017.zip (18 GB), val2017.zip (1 GB) and annotations_trainval2017.zip"
    " (241 MB). Unpack all three into a folder DIR, which then has train2017/, val2017/"
    " and annotations/, and pass --data_dir=DIR. Other data sets of this form are read,"
    " too, under the same names."
)


class Picture(NamedTuple):
    """An image of a split, and the objects on it that there are to learn.

    Attributes:
        id: of the image.
        file: within the folder of the split.
        height, width: in pixels.
        boxes: ``[n, 4]`` float32: x1, y1, x2, y2, clipped to the image.
        labels: ``[n]`` int32, from 1.
        crowd: ``[n]`` bool.
        segmentations: n, as of `annotations.decode`.
    """

    id: int
    file: Found
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    segmentations: list[Any]


@dataclasses.dataclass(frozen=True)
class CocoSplit(ObjectSource):
    """A split of a COCO directory.

    Attributes:
        root: the folder of its images.
        rows: its images.
        annotations: of the whole split.
        scale: to which images are brought.
        max_pixels: larger images are refused before they are decoded.
    """

    root: pathlib.Path
    rows: Sequence[Picture]
    annotations: Annotations
    scale: Scale
    max_pixels: int = MAX_PIXELS

    @property
    def examples(self) -> int:
        """Number of images."""
        return len(self.rows)

    def take(self, examples: int) -> CocoSplit:
        """Returns the first so many images; all of them for 0.

        Raises:
            ValueError: there are fewer.
        """
        return dataclasses.replace(
            self, rows=self.rows[: first(examples, len(self.rows))]
        )

    @functools.cached_property
    def pictures(self) -> Pictures:
        """What is known of all images."""
        shapes = [(row.height, row.width) for row in self.rows]
        return pictures_of((row.id for row in self.rows), shapes, self.scale)

    @property
    def truth(self) -> dict[str, Any]:
        """Images, all annotations and categories in COCO's form."""
        return self.annotations.truth(row.id for row in self.rows)

    def describe(self) -> dict[str, Any]:
        """Returns what to know the split by, see `train.data.fingerprint`."""
        digest = hashlib.sha256(self.annotations.digest.encode())
        for row in self.rows:
            digest.update(f"\n{row.file.path}\0{row.file.size}".encode())
        labels = np.concatenate([row.labels[~row.crowd] for row in self.rows])
        classes = len(self.annotations.categories.ids)
        return {
            "images": self.examples,
            "shape": [*self.scale],
            "dtype": "uint8",
            "by_class": np.bincount(labels, minlength=classes + 1)[1:].tolist(),
            "sha256": digest.hexdigest(),
        }

    def read(
        self, index: np.ndarray, key: Sequence[int] | None = None
    ) -> Objects[np.ndarray]:
        """Returns the examples `index`, whose canvases are of one size.

        Raises:
            ValueError: an image that cannot be decoded, or is not as large as its
                annotations say; the message names it.
        """
        objects = Objects.on(self.read_canvases(index), SLOTS, MASK_SIZE)
        for slots, example in enumerate(index.tolist()):
            row = self.rows[example]
            count = len(row.labels)
            factors = objects.size[slots] / (row.height, row.width)
            objects.boxes[slots, :count] = row.boxes * np.tile(factors[::-1], 2)
            objects.labels[slots, :count] = row.labels
            objects.crowd[slots, :count] = row.crowd
            for slot in np.flatnonzero(~row.crowd).tolist():
                mask = decode(row.segmentations[slot], row.height, row.width)
                objects.masks[slots, slot] = crop_mask(mask, row.boxes[slot], MASK_SIZE)
        return objects

    def read_canvases(self, index: np.ndarray) -> Canvases[np.ndarray]:
        """Returns the images of these examples alone; see `read`."""
        canvases = Canvases.black(self.pictures.canvas[index])
        for place, example in enumerate(index.tolist()):
            row = self.rows[example]
            path, shape = self.root / row.file.path, (row.height, row.width)
            canvases.draw(place, path, shape, self.scale, self.max_pixels)
        return canvases


def load_coco(
    root: pathlib.Path,
    train_split: str,
    scales: tuple[Scale, Scale],
    max_pixels: int = MAX_PIXELS,
) -> tuple[ObjectData[CocoSplit], str]:
    """Reads the annotations of a directory, and looks for its images.

    Args:
        root: has ``annotations/instances_{train,val}2017.json``, ``train2017/`` and
            ``val2017/``.
        train_split: ``"train"`` or ``"val"``: what to train on. Tested is on ``val``.
        scales: of the images to train on, and of those to test on.
        max_pixels: of an image, at most.

    Returns:
        The splits, and what was taken and what was not, for people to read. Images
        without objects are not trained on, but tested on.

    Raises:
        FileNotFoundError: the directory or images are not there.
        ValueError: annotations that cannot be meant; see `read_annotations`.
    """
    _check_there(root, train_split)
    found = {split: _read(root, split) for split in sorted({train_split, "val"})}
    ours, theirs = (found[split].categories for split in (train_split, "val"))
    if ours != theirs:
        raise ValueError(
            f"the annotations of {train_split} and val in {root} have other categories:"
            f" {_few(ours)} and {_few(theirs)}."
        )
    splits: list[CocoSplit] = []
    lines = []
    for split, scale in zip((train_split, "val"), scales):
        folder = root / f"{split}2017"
        rows = _pictures(folder, found[split])
        summary = _summary(folder, rows, found[split])
        if not splits:
            rows = [row for row in rows if not row.crowd.all()]
            if not rows:
                raise ValueError(f"no image in {folder} has an object to learn.")
            summary += f"; {len(rows):,} images to train on have objects"
        elif not any((~row.crowd).any() for row in rows):
            raise ValueError(f"no image in {folder} has an object to find.")
        lines.append(summary)
        splits.append(CocoSplit(folder, rows, found[split], scale, max_pixels))
    train, test = splits
    return ObjectData(train, test, ours, "val"), "\n".join(lines)


def _read(root: pathlib.Path, split: str) -> Annotations:
    return read_annotations(root / "annotations" / f"instances_{split}2017.json")


def _check_there(root: pathlib.Path, train_split: str) -> None:
    for split in sorted({train_split, "val"}):
        for place in (f"annotations/instances_{split}2017.json", f"{split}2017"):
            if not (root / place).exists():
                raise FileNotFoundError(f"no {place} in {root}. {_DOWNLOAD}")


def _pictures(folder: pathlib.Path, annotations: Annotations) -> list[Picture]:
    """The images of a split, sorted by id.

    Raises:
        FileNotFoundError: some are not there.
    """
    missing, rows = [], []
    labels = {i: label for label, i in enumerate(annotations.categories.ids, 1)}
    for i in sorted(annotations.images):
        image = annotations.images[i]
        name = image["file_name"]
        try:
            stat = (folder / name).stat()
        except FileNotFoundError:
            missing.append(name)
            continue
        file = Found(name, stat.st_size, stat.st_mtime_ns)
        height, width = image["height"], image["width"]
        objects = _learnable(annotations.objects[i], height, width)
        rows.append(
            Picture(
                i,
                file,
                height,
                width,
                np.array([box for box, _ in objects], np.float32).reshape(-1, 4),
                np.array(
                    [labels[each["category_id"]] for _, each in objects], np.int32
                ),
                np.array([each["iscrowd"] for _, each in objects], bool),
                [each["segmentation"] for _, each in objects],
            )
        )
    if missing:
        try:
            refuse(folder, "images missing that have annotations", missing)
        except ValueError as error:
            raise FileNotFoundError(f"{error} {_DOWNLOAD}") from None
    return rows


def _learnable(
    objects: Sequence[dict[str, Any]], height: int, width: int
) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """The objects that are large enough, with their boxes; at most as many as there are
    slots, the largest."""
    found = []
    for each in objects:
        x, y, w, h = each["bbox"]
        box = np.clip([x, y, x + w, y + h], 0, [width, height, width, height])
        w, h = box[2:] - box[:2]
        if min(w, h) > 0 and w * h >= LEAST_BOX and each["area"] > LEAST_MASK:
            found.append((w * h, box, each))
    areas = np.array([area for area, _, _ in found])
    largest = np.sort(np.argsort(-areas, kind="stable")[:SLOTS])
    return [found[i][1:] for i in largest.tolist()]


def _summary(
    folder: pathlib.Path, rows: Sequence[Picture], annotations: Annotations
) -> str:
    """A line of what was taken, and what was not."""
    crowds = sum(int(row.crowd.sum()) for row in rows)
    objects = sum(len(row.crowd) for row in rows) - crowds
    small = sum(map(len, annotations.objects.values())) - objects - crowds
    parts = [
        f"{count:,} {what}"
        for count, what in (
            (crowds, "crowds, which are ignored"),
            (small, "too small or too many to learn"),
            (annotations.maskless, "left out, without a mask"),
        )
        if count
    ]
    categories = len(annotations.categories.ids)
    return (
        f"{folder}: {len(rows):,} images, {objects:,} objects of {categories} classes"
        + "".join(f", {part}" for part in parts)
    )


def _few(categories: Categories) -> str:
    names = [f"{i} {name!r}" for i, name in zip(*categories)]
    return f"{len(names)} ({', '.join(names[:3])} ...)"
