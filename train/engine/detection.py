"""The task of finding objects in an image: their boxes, classes and masks."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from kalman_flax._filter.state import check_choice
from kalman_flax.layers.linear import RNG
from kalman_flax.models.detection.recipe import Detections, Targets
from train.data.batches import Standardize, make_standardize
from train.data.check import Group, check_files
from train.data.coco import CocoSplit, load_coco
from train.data.fingerprint import check_same, fingerprint_objects
from train.data.objects import (
    Categories,
    ObjectData,
    Objects,
    ObjectSource,
    PictureSource,
    Scale,
    make_bucket_batches,
)
from train.data.scene_objects import load_scenes
from train.engine import processes
from train.engine.average_precision import results, score
from train.engine.detector import (
    Detector,
    make_detector,
    prepare,
)
from train.engine.step import TrainState, split_evenly

DATASETS = ("coco", "scenes")
#: of a detector's losses, by name; the last is the sum of the others
LOSSES = ("rpn_class", "rpn_box", "head_class", "head_box", "mask", "loss")
#: that would change nothing here
_UNUSED = {"crop_padding": 0, "sort_batches": False}


@dataclasses.dataclass(frozen=True)
class Detection:
    """Images and the objects on them, a `train.engine.task.Task`.

    Attributes:
        config: of the run.
        mesh: its devices.
        categories: the classes.
        network: maps standardised canvases to detections, and to losses.
        standardize: maps uint8 pixels to what the network takes.
        data: the splits; of None where there are only images to be looked at, see
            `without_data`.
    """

    config: Any
    mesh: Mesh
    categories: Categories
    network: nn.Module
    standardize: Standardize
    data: ObjectData[Any]

    shown: ClassVar[Mapping[str, str]] = dict.fromkeys(LOSSES[::-1], ".3f")
    headline: ClassVar[str] = "moving_box_AP"
    validation = None

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuses, with a ValueError, what cannot be, or would change nothing."""
        check_choice("dataset", config.dataset, DATASETS)
        network = make_detector(config, num_classes=1)
        if getattr(network, "freeze_at", 0) and not config.freeze:
            raise ValueError(
                f"network_options.freeze_at is {network.freeze_at}, but freeze is"
                " empty: weight decay would move what has no gradient. Name the frozen"
                ' parameters, say ("stem*", "stage1_*").'
            )
        if getattr(network, "freeze_at", 0) and not config.init_from:
            raise ValueError(
                f"network_options.freeze_at is {network.freeze_at}, but init_from is"
                " empty: the frozen layers would stay as they are drawn at random. Name"
                " a pre-trained network by --config.init_from, see docs/fine-tuning.md,"
                " or freeze nothing."
            )
        for key, unused in _UNUSED.items():
            if config[key] != unused:
                raise ValueError(
                    f"{key} is {config[key]}, but task 'detection' does not use it;"
                    f" leave it at {unused}."
                )
        for scale in scales(config):
            if scale.long < scale.short:
                raise ValueError(
                    f"long_side {scale.long} is less than short_side {scale.short}."
                )

    @classmethod
    def build(cls, config: Any, mesh: Mesh, data_dir: str | None) -> Self:
        """Finds the images, and makes the network.

        Raises:
            ValueError: a setting that cannot be, or annotations that cannot be meant.
            FileNotFoundError: the data set is not there.
        """
        data, images = load_data(config, data_dir)
        standardize = make_standardize(config.standardize, images)
        network = make_detector(config, len(data.categories.ids))
        return cls(config, mesh, data.categories, network, standardize, data)

    @classmethod
    def without_data(cls, config: Any, mesh: Mesh, kept: Mapping[str, Any]) -> Self:
        """Makes the network alone, of what `check_data` returned at its training."""
        categories = Categories(
            tuple(map(int, kept["categories"])), tuple(kept["categories"].values())
        )
        moments = {
            key: np.asarray(value, np.float32)
            for key, value in kept["images"]["standardize"].items()
        }
        network = make_detector(config, len(categories.ids))
        nothing = ObjectData(None, None, categories)
        return cls(config, mesh, categories, network, Standardize(**moments), nothing)

    @property
    def train(self) -> ObjectSource:
        """The training images of the run."""
        return self.data.train

    @property
    def test(self) -> ObjectSource:
        """Its test images."""
        return self.data.test

    @property
    def test_name(self) -> str:
        """What the data set calls them."""
        return self.data.test_name

    def check_data(
        self, kept: Mapping[str, Any] | None, files: bool = False
    ) -> dict[str, Any]:
        """Returns what to know the images by, which files were found good, and the
        classes.

        Raises:
            ValueError: they are not those of `kept`, or files cannot be decoded.
        """
        found = fingerprint_objects(self.config.dataset, self.data, self.standardize)
        checked = {}
        if kept is not None:
            check_same(kept.get("images", {}), found)
            checked = kept.get("files", {})
        if files:
            groups = [
                Group(split.root.name, split.root, [row.file for row in split.rows])
                for split in (self.train, self.test)
                if isinstance(split, CocoSplit)
            ]
            checked = check_files(groups, self.config.max_pixels, checked)
        categories = dict(zip(map(str, self.categories.ids), self.categories.names))
        return {"images": found, "files": checked, "categories": categories}

    def inputs(self) -> dict[str, jax.Array]:
        """Returns one black canvas, as the network takes it."""
        height, width = scales(self.config)[0].canvas(1, 1)
        return {
            "image": jnp.zeros((1, height, width, 3)),
            "size": jnp.array([[height, width]], jnp.int32),
        }

    def order(self) -> Callable[[int], np.ndarray]:
        """Returns a map from the step to the images of its batch, ``[batch_size]``, all
        on canvases of one kind."""
        portrait = is_portrait(self.train)
        return make_bucket_batches(portrait, self.config.batch_size, self.config.seed)

    def draw(self, key: jax.Array) -> jax.Array | None:
        """Draws which images are mirrored, ``[batch_size]`` bool; None for none."""
        config = self.config
        if not config.flip:
            return None
        return jax.random.bernoulli(key, shape=(config.batch_size,))

    def loss(
        self,
        network: nn.Module,
        variables: dict[str, Any],
        batch: Objects[jax.Array],
        draws: jax.Array | None,
        keys: jax.Array,
        mutable: Sequence[str] = ("batch_stats",),
    ) -> tuple[dict[str, jax.Array], Any]:
        """Returns the sums of the losses of the detector, and what was written.

        The key of a micro-batch samples its anchors and regions, too.
        """
        if draws is not None:
            batch = mirror(batch, draws)
        inputs = prepare(batch.canvases, self.standardize)
        targets = Targets(batch.boxes, batch.labels, batch.crowd, batch.masks)

        def losses(inputs: Any, targets: Targets, key: jax.Array) -> tuple[Any, Any]:
            return network.apply(
                variables,
                inputs,
                targets,
                key,
                use_running_average=False,
                mutable=mutable,
                rngs={RNG: key},
                method="losses",
            )

        inputs, targets = split_evenly((inputs, targets), len(keys))
        found, written = jax.vmap(losses)(inputs, targets, keys)
        return {name: jnp.sum(found[name]) for name in LOSSES}, written

    def evaluate(self, state: TrainState, source: ObjectSource) -> dict[str, float]:
        """Returns COCO's numbers for boxes and masks, under both options of the paper.

        ``moving_box_AP`` and so on normalise by the moving statistics (option A),
        ``batch_box_AP`` by those of each image (option B); ``moving_mask_AP`` is of the
        masks. See `train.engine.average_precision`.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        looking = tqdm(
            self.detect(state, source),
            "looking for objects",
            source.examples,
            unit="img",
            leave=False,
            delay=1.0,
            disable=not processes.primary(),
        )
        for example, options in looking:
            for option, detections in options.items():
                found.setdefault(option, []).extend(
                    self.results(source, example, detections)
                )
        truth = source.truth
        return {
            f"{option}_{kind}_{name}": number
            for option, those in found.items()
            for kind, numbers in score(truth, those).items()
            for name, number in numbers.items()
        }

    def results(
        self, source: PictureSource, example: int, found: Detections
    ) -> list[dict[str, Any]]:
        """Returns the detections on an image of `source`, in COCO's form."""
        ids, original, size, _ = (each[example] for each in source.pictures)
        return results(found, ids, original, size, self.categories.ids)

    def detect(
        self, state: TrainState, source: PictureSource
    ) -> Iterator[tuple[int, dict[str, Detections]]]:
        """Yields every example of `source` once, with what is found there under both
        options: ``"moving"`` and ``"batch"``, see `evaluate`."""
        return self._detector(state, source)

    @functools.cached_property
    def _detector(self) -> Detector:
        return Detector(self.network, self.standardize, self.config, self.mesh)


def scales(config: Any) -> tuple[Scale, Scale]:
    """Returns how large images are to train and to test."""
    if config.dataset == "scenes":
        size = config.image_size
        scale = Scale(size, size, size)
        return scale, scale
    train = Scale(config.short_side, config.long_side, config.canvas_multiple)
    test = train._replace(
        short=config.test_short_side or train.short,
        long=config.test_long_side or train.long,
    )
    return train, test


def load_data(config: Any, data_dir: str | None) -> tuple[ObjectData[Any], Any]:
    """Returns the data that a config names, and the training images, if they are in
    memory.

    Raises:
        ValueError, FileNotFoundError: see `load_coco`.
    """
    examples = config.train_examples, config.test_examples
    if config.dataset == "scenes":
        data = load_scenes(examples, config.image_size)
        return data, data.train.objects.image
    if not data_dir:
        raise ValueError(
            "dataset is 'coco'; pass --data_dir=DIR, with DIR/annotations/,"
            " DIR/train2017/ and DIR/val2017/."
        )
    root = pathlib.Path(data_dir).expanduser()
    data, summary = load_coco(
        root, config.train_split, scales(config), config.max_pixels
    )
    if processes.primary():
        print(summary, file=sys.stderr, flush=True)
    train, test = (
        split.take(count) for split, count in zip((data.train, data.test), examples)
    )
    return data._replace(train=train, test=test), None


def is_portrait(source: ObjectSource) -> np.ndarray:
    """Returns which images lie on portrait canvases, ``[N]`` bool."""
    height, width = source.pictures.canvas.T
    return height > width


def mirror(batch: Objects[jax.Array], mirrored: jax.Array) -> Objects[jax.Array]:
    """Mirrors some images of a batch, left and right, and their objects.

    Args:
        batch: on the device.
        mirrored: which, ``[N]`` bool.
    """
    width = batch.size[:, 1]
    column = jnp.arange(batch.image.shape[2])
    inside = mirrored[:, None] & (column < width[:, None])
    column = jnp.where(inside, width[:, None] - 1 - column, column)
    x1, y1, x2, y2 = jnp.moveaxis(batch.boxes, -1, 0)
    there = mirrored[:, None] & (batch.labels > 0)
    x1, x2 = (jnp.where(there, width[:, None] - x, y) for x, y in ((x2, x1), (x1, x2)))
    return batch._replace(
        image=jnp.take_along_axis(batch.image, column[:, None, :, None], 2),
        boxes=jnp.stack([x1, y1, x2, y2], -1),
        masks=jnp.where(
            mirrored[:, None, None, None], batch.masks[..., ::-1], batch.masks
        ),
    )
