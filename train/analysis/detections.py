"""What a trained detector finds on images that nobody annotated."""

from __future__ import annotations

import copy
import functools
import pathlib
from typing import Any

from tqdm import tqdm

from train.analysis.draw import draw
from train.data.picture_files import PictureFiles
from train.engine import trained_on
from train.engine import workdir as wd
from train.engine.detection import Detection
from train.engine.detector import Detector
from train.engine.mesh import make_key, make_mesh
from train.engine.optimizer import make_optimizer
from train.engine.settings import task_of
from train.engine.step import create_state


def kind_of(config: Any) -> type[Detection]:
    """Returns the class of the task of a run.

    Raises:
        ValueError: it is none of detection.
    """
    kind = task_of(config)
    if not issubclass(kind, Detection):
        raise ValueError(f"the task of the run is {config.task!r}, not detection.")
    return kind


def restore(config: Any, workdir: pathlib.Path) -> tuple[Detection, Any]:
    """Returns the detector of a run, and its last checkpoint, without its data: on one
    device, one image at a time.

    Raises:
        ValueError: nothing in `workdir` says what it was trained on; or see `kind_of`.
        FileNotFoundError: there is no checkpoint.
    """
    kept = trained_on.read(workdir)
    if kept is None or "categories" not in kept:
        raise ValueError(
            f"there is no {trained_on.DATA} in {workdir}, which names the classes."
        )
    config = copy.deepcopy(config)
    config.eval_batch_size = 1
    mesh = make_mesh(1)
    task = kind_of(config).without_data(config, mesh, kept)
    optimizer = functools.partial(make_optimizer, config)
    state = create_state(task, optimizer, make_key(mesh, config.seed), mesh)
    return task, wd.last_checkpoint(workdir, state)


def find(task: Detection, state: Any, files: PictureFiles) -> dict[str, Any]:
    """Returns what is on the images, in COCO's form; of each image the most certain
    last."""
    annotations: list[dict[str, Any]] = []
    detector = Detector(
        task.network, task.standardize, task.config, task.mesh, ("moving",)
    )
    looking = tqdm(detector(state, files), total=files.examples, unit="img", delay=1.0)
    for example, found in looking:
        those = task.results(files, example, found["moving"])
        annotations += sorted(those, key=lambda each: each["score"])
    return {
        "images": [
            {"id": int(i), "file_name": path.name, "height": int(h), "width": int(w)}
            for i, path, (h, w) in zip(
                files.pictures.ids, files.paths, files.pictures.original
            )
        ],
        "annotations": [
            each | {"id": number, "iscrowd": 0}
            for number, each in enumerate(annotations, 1)
        ],
        "categories": task.categories.in_coco(),
    }


def draw_all(
    files: PictureFiles, content: dict[str, Any], least: float, output: pathlib.Path
) -> int:
    """Writes NAME.png for each image NAME.

    Args:
        files: the images.
        content: what `find` returned.
        least: score of what is drawn.
        output: where to.

    Returns:
        How many objects are on the pictures.
    """
    names = {each["id"]: each["name"] for each in content["categories"]}
    certain: dict[int, list[dict[str, Any]]] = {}
    for each in content["annotations"]:
        if each["score"] >= least:
            certain.setdefault(each["image_id"], []).append(each)
    for example, image in enumerate(content["images"]):
        picture = draw(files.pixels(example), certain.get(image["id"], []), names)
        picture.save(output / f"{image['file_name']}.png")
    return sum(map(len, certain.values()))
