"""The time of a training step on random images, several programs in turn."""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from train.data.batches import Split, Standardize
from train.data.coco import MASK_SIZE
from train.data.objects import Canvases, Categories, ObjectData, Objects
from train.data.sets import Dataset
from train.engine.classification import Classification, make_network
from train.engine.detection import Detection, scales
from train.engine.detector import make_detector
from train.engine.mesh import make_key, make_mesh, take
from train.engine.optimizer import make_optimizer
from train.engine.step import TrainState, create_state, jit_update, make_update
from train.engine.task import Task

#: maps pixels to -1 to 1
_MIDDLE = Standardize(np.array([128.0], np.float32), np.array([128.0], np.float32))


def prepare(
    config: ConfigDict, size: int, num_classes: int | None = None
) -> tuple[Task, Any, TrainState, Any]:
    """Returns task, train step, state and a batch of random images.

    Args:
        config: of a classifier or a detector.
        size: height and width of the images; of a detector's, the shorter side, and
            the longer one is 5/3 of it.
        num_classes: of the images, or of the objects (default: 10 as in CIFAR-10, or
            80 as in COCO).
    """
    mesh = make_mesh(config.batch_size // config.micro_batch_size)
    task, examples = (
        _detection(config, mesh, size, num_classes or 80)
        if config.task == "detection"
        else _classification(config, mesh, size, num_classes or 10)
    )
    optimizer = functools.partial(make_optimizer, config)
    key = make_key(mesh, 0)
    state = create_state(task, optimizer, key, mesh)
    step = jit_update(
        at_constant_rate(config, make_update(task, optimizer, config, mesh), key)
    )
    return task, step, state, take(mesh, examples, np.arange(config.batch_size))


def _classification(
    config: ConfigDict, mesh: Mesh, size: int, num_classes: int
) -> tuple[Classification, Split[np.ndarray]]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (config.batch_size, size, size, 3), np.uint8)
    labels = random.integers(0, num_classes, config.batch_size, np.int32)
    split = Split(images, labels)
    dataset = Dataset(split, split, num_classes)
    network = make_network(config, num_classes)
    return Classification(config, mesh, dataset, network, _MIDDLE), split


def _detection(
    config: ConfigDict, mesh: Mesh, size: int, num_classes: int
) -> tuple[Detection, Objects[np.ndarray]]:
    """Images as large as they come, 20 objects on each."""
    config = copy.deepcopy(config)
    config.short_side, config.long_side = size, size * 5 // 3
    random, count, slots = np.random.default_rng(0), config.batch_size, 20
    shape = scales(config)[0].canvas(1, 2)
    canvases = Canvases(
        random.integers(0, 256, (count, *shape, 3), np.uint8),
        np.tile(np.array([size, config.long_side], np.int32), (count, 1)),
    )
    objects = Objects.on(canvases, slots, MASK_SIZE)
    corner = random.uniform(0, size / 2, (count, slots, 2))
    sides = random.uniform(size / 20, size / 2, (count, slots, 2))
    objects.boxes[:] = np.concatenate([corner, corner + sides], -1)
    objects.labels[:] = random.integers(1, num_classes + 1, (count, slots))
    objects.masks[:] = 255
    categories = Categories(
        tuple(range(num_classes)), tuple(map(str, range(num_classes)))
    )
    network = make_detector(config, num_classes)
    data = ObjectData(None, None, categories)
    return Detection(config, mesh, categories, network, _MIDDLE, data), objects


def at_constant_rate(config: ConfigDict, update: Callable, key: jax.Array) -> Callable:
    """Returns the update ``(state, batch) -> (state, metrics)``, at one rate."""
    rates = jnp.array([config.learning_rate])  # whose last is that of all later steps
    return lambda state, batch: update(state, batch, key, rates)


class Stepper:
    """Called, starts an update, and keeps the state for the next."""

    def __init__(self, step: Callable, state: TrainState, batch: Split[jax.Array]):
        self.step, self.state, self.batch = step, state, batch

    def __call__(self) -> Any:
        """Returns what is ready when the update is done."""
        self.state, metrics = self.step(self.state, self.batch)
        return self.state, metrics


def measure(run: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Times each function once a round, after one call to warm up; in random order, as
    what ran before leaves its mark on caches, memory and waiting threads.

    A time is that of a call until what it returns is ready. A GPU or TPU is given ten
    at a time, between which the host does not wait for it, as in training.
    """
    calls = 1 if jax.default_backend() == "cpu" else 10
    seconds: dict[str, list[float]] = {name: [] for name in run}
    random, names = np.random.default_rng(0), list(run)
    for number in range(rounds + 1):
        for index in random.permutation(len(names)):
            name = names[index]
            start = time.perf_counter()
            for _ in range(calls):
                result = run[name]()
            jax.block_until_ready(result)
            if number:
                seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def ratio(values: list[float], baseline: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratios round by round: what slows a whole round
    leaves them alone."""
    return quartiles(np.array(values) / np.array(baseline))


def quartiles(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    median, lower, upper = np.quantile(values, (0.5, 0.25, 0.75)).tolist()
    return median, lower, upper


def between_lines(lines: list[dict[str, float]], batch_size: int) -> list[float]:
    """Returns images per second between the lines of a log, but where a test lies
    between them."""
    return [
        batch_size * (line["step"] - last["step"]) / (line["seconds"] - last["seconds"])
        for last, line in itertools.pairwise(lines)
        if "train_loss" in last and "train_loss" in line
    ]
