"""What is exported of a trained network, task by task: programs, and words on them."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kalman_flax.layers.linear import RNG
from kalman_flax.models.detection.rpn import RPNHead
from train.analysis import stablehlo
from train.data.encoded import Encoded
from train.data.objects import Canvases
from train.data.pairs import Pairs
from train.engine import detector
from train.engine.classification import Classification, infer
from train.engine.detection import Detection, scales
from train.engine.segmentation import Segmentation
from train.engine.task import Task, of_kind

NETWORK = "network.stablehlo"
#: test images on which plain Flax is to give the same logits
_TRIED = 8
#: side of the canvas on which it is to find the same proposals
_TRIED_SIDE = 128


class Exported(NamedTuple):
    """A network in forms that run without this project.

    Attributes:
        programs: by the names of their files.
        plain: see `stablehlo.plain_variables`.
        standardize: mean and scale of the images.
        described: what goes in and comes out, for JSON.
    """

    programs: dict[str, bytearray]
    plain: stablehlo.Plain | None
    standardize: dict[str, np.ndarray]
    described: dict[str, Any]


def export(task: Task, variables: Any) -> Exported:
    """Exports the network of a task, in inference by moving statistics (option A).

    Raises:
        ValueError: of this task nothing can be exported.
    """
    variables = jax.device_get(variables)
    if isinstance(task, Detection):
        return _detector(task, variables)
    if isinstance(task, Segmentation):
        return _images_to(
            task,
            variables,
            shape=["batch", *task.test.image_shape[:2], task.network.num_classes],
            meaning="logits of every pixel; the class with the largest is that of the"
            " pixel",
            classes=task.data.classes,
        )
    task = of_kind(task, Classification)
    return _images_to(
        task,
        variables,
        shape=["batch", task.network.num_classes],
        meaning="logits; their softmax are the probabilities of the classes",
        classes=task.dataset.classes,
    )


def _images_to(
    task: Classification | Segmentation,
    variables: Any,
    shape: list[Any],
    meaning: str,
    classes: Any,
) -> Exported:
    """A network from images to logits, which are described."""
    network, standardize, test = task.network, task.standardize, task.test

    def serve(images: jax.Array) -> jax.Array:
        return infer(network, variables, standardize(images))

    image = jax.ShapeDtypeStruct(test.image_shape, jnp.uint8)
    tried = standardize(test.read(np.arange(_TRIED) % test.examples).images)
    preparation = "pixels as the data set has them; the network standardises them"
    how = {
        Encoded: "of the shorter side the central 224/256, resized with antialiasing",
        Pairs: "the longer side resized to that of the square, the rest of it black",
    }
    if type(test) in how:
        preparation += f"; RGB, {how[type(test)]}"
    described = {
        "network": {"file": NETWORK, "platforms": stablehlo.PLATFORMS},
        "input": {
            "shape": ["batch", *test.image_shape],
            "dtype": "uint8",
            "preparation": preparation,
        },
        "output": {"shape": shape, "dtype": "float32", "meaning": meaning},
        "classes": classes,
    }
    return Exported(
        {NETWORK: stablehlo.serialize(serve, image)},
        stablehlo.plain_variables(network, variables, tried),
        standardize._asdict(),
        described,
    )


def _detector(task: Detection, variables: Any) -> Exported:
    """A detector: a program for each canvas, as anchors lie on it."""
    network, standardize = task.network, task.standardize

    def inputs(image: jax.Array, size: jax.Array) -> dict[str, jax.Array]:
        return detector.prepare(Canvases(image, size), standardize)

    def serve(image: jax.Array, size: jax.Array) -> dict[str, jax.Array]:
        return detector.infer(network, variables, inputs(image, size))._asdict()

    scale = scales(task.config)[1]
    size = jax.ShapeDtypeStruct((2,), jnp.int32)
    programs, networks = {}, []
    for canvas in sorted({scale.canvas(1, 1), scale.canvas(2, 1)}):
        image = jax.ShapeDtypeStruct((*canvas, 3), jnp.uint8)
        file = f"network_{canvas[0]}x{canvas[1]}.stablehlo"
        programs[file] = stablehlo.serialize(serve, image, size)
        networks.append({"file": file, "canvas": canvas})
    side = _TRIED_SIDE
    noise = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
    tried = inputs(jnp.asarray(noise), jnp.array([[side, side]]))
    described = {
        "networks": networks,
        "platforms": stablehlo.PLATFORMS,
        "input": {
            "image": {"shape": ["batch", "height", "width", 3], "dtype": "uint8"},
            "size": {"shape": ["batch", 2], "dtype": "int32"},
            "short_side": scale.short,
            "long_side": scale.long,
            "preparation": "RGB, resized: the shorter side to short_side, but the"
            " longer to long_side at most; in the upper left corner of the smaller of"
            " the canvases that hold it. size is height and width there. The network"
            " standardises the pixels, and does not look at the rest of the canvas",
        },
        "output": _FOUND,
        "classes": task.categories.names,
        "category_ids": task.categories.ids,
    }
    plain = stablehlo.plain_variables(network, variables, tried, _proposed)
    return Exported(programs, plain, standardize._asdict(), described)


#: what a detector gives, best first
_FOUND = {
    "boxes": "x1, y1, x2, y2 in pixels of the canvas, [batch, slots, 4] float32",
    "scores": "the probability of the class, [batch, slots] float32",
    "labels": "k for classes[k - 1], 0 for an empty slot, [batch, slots] int32",
    "masks": "over each box, the probability that a pixel is of the object,"
    " [batch, slots, m, m] float32",
}


def _proposed(network: nn.Module, variables: Any, inputs: Any) -> Any:
    """What the region proposal network says of each anchor: before anything is chosen,
    which differences of rounding could change. Of a detector without one, what it
    finds."""
    found, written = network.apply(
        variables,
        inputs,
        use_running_average=True,
        rngs={RNG: jax.random.key(0)},
        capture_intermediates=lambda module, _: isinstance(module, RPNHead),
        mutable=["intermediates"],
    )
    return written["intermediates"] if written else found
