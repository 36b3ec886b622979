"""Segmentation as a task: its numbers against loops, images and masks that move
together, a run, and what the commands say of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from configs.experiments import scenes_segmentation
from kalman_flax.models import Network
from tests.train.commands.test_commands import run
from tests.train.common import tiny_config
from train.analysis import programs, segments
from train.analysis.inference_statistics import recompute
from train.data.batches import Crops, Split, Standardize
from train.data.segment_sets import SegmentData
from train.data.segments import IGNORE, augment_both
from train.engine import loop, trained_on
from train.engine.classification import Classification
from train.engine.experiment import build
from train.engine.mesh import make_mesh
from train.engine.segmentation import Segmentation, iou_and_dice
from train.engine.step import TrainState
from train.engine.task import of_kind

NOTHING = TrainState(0, {}, {}, {}, ())
CLASSES = ("background", "one", "two")


class Told(nn.Module):
    """Takes the pixels of an image for its logits."""

    @nn.compact
    def __call__(self, images, use_running_average):
        return images


class Tiny(Network):
    """A convolution and a norm, at every pixel."""

    num_classes: int
    width: int = 2

    def _features(self, x, layers):
        return layers.conv_norm_activation(x, self.width, 3, name="conv")

    def _pooled(self, x):
        return x


def told(examples=5):
    """A task whose predictions are the largest channel, on 4 x 3 pixels."""
    random = np.random.default_rng(0)
    images = random.integers(256, size=(examples, 4, 3, 3)).astype(np.uint8)
    labels = random.choice([0, 1, IGNORE], (examples, 4, 3)).astype(np.uint8)
    labels[0] = IGNORE
    split = Split(images, labels)
    config = tiny_config(batch_size=2, micro_batch_size=1, eval_batch_size=2)
    data = SegmentData(split, split, CLASSES)
    mesh = make_mesh(2, jax.devices()[:1])
    return Segmentation(config, mesh, data, Told(), Standardize(0.0, np.float32(64)))


def losses(split):
    """Of each pixel its loss, its label and what it is taken for, by a loop."""
    for image, labels in zip(np.float64(split.images) / 64, split.labels):
        yield [
            (np.log(np.exp(pixel).sum()) - pixel[label], label, pixel.argmax())
            for pixel, label in zip(image.reshape(-1, 3), labels.ravel())
            if label != IGNORE
        ]


def test_numbers_of_a_split():
    task = told()
    found = task.evaluate(NOTHING, task.test)
    pixels = [pixel for image in losses(task.test) for pixel in image]
    truth, taken = np.array([pixel[1:] for pixel in pixels]).T
    iou, dice = [], []
    for label in range(3):
        here, there = truth == label, taken == label
        iou.append((here & there).sum() / (here | there).sum())
        dice.append(2 * (here & there).sum() / (here.sum() + there.sum()))
    expected = {
        "loss": np.mean([pixel[0] for pixel in pixels]),
        "accuracy": np.mean(truth == taken),
        "miou": np.mean(iou),
        "dice": np.mean(dice),
    }
    for option in ("moving", "batch"):
        for name, value in expected.items():
            np.testing.assert_allclose(found[f"{option}_{name}"], value, rtol=1e-5)
    assert len(found) == 8
    # A class that is nowhere counts nowhere.
    iou, dice = iou_and_dice(np.array([[2, 1, 0], [0, 1, 0], [0, 0, 0]]))
    np.testing.assert_allclose(iou, [2 / 3, 1 / 2, np.nan])
    np.testing.assert_allclose(dice, [4 / 5, 2 / 3, np.nan])


def test_the_loss_is_the_mean_over_the_pixels_of_an_image():
    task = told()
    keys = jax.random.split(jax.random.key(0), 5)
    nothing = Crops(None, None)
    sums, _ = task.loss(task.network, {}, task.train, nothing, keys)
    images = [image for image in losses(task.train) if image]
    loss = sum(np.mean([pixel[0] for pixel in image]) for image in images)
    right = sum(np.mean([pixel[1] == pixel[2] for pixel in image]) for image in images)
    np.testing.assert_allclose(sums["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(sums["accuracy"], right, rtol=1e-5)


def test_images_and_labels_move_together():
    labels = np.arange(1, 41, dtype=np.uint8).reshape(2, 5, 4)
    labels[0, 0, 0] = IGNORE
    images = np.repeat(labels[..., None], 3, -1)
    crops = Crops(jnp.array([[0, 3], [2, 1]]), jnp.array([[[[True]]], [[[False]]]]))
    found = augment_both(Split(images, labels), crops, 2)
    for example, (top, left) in enumerate([(0, 3), (2, 1)]):
        wide = np.pad(labels[example], 2, constant_values=IGNORE)
        expected = wide[top : top + 5, left : left + 4]
        expected = expected[:, ::-1] if example == 0 else expected
        np.testing.assert_array_equal(found.labels[example], expected)
        shown = np.where(found.labels[example] == IGNORE, 0, found.labels[example])
        picture = np.asarray(found.images[example, ..., 0])
        np.testing.assert_array_equal(np.where(picture == IGNORE, 0, picture), shown)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(kf.SEGMENTERS, "tiny", Tiny)
    config = scenes_segmentation.get_config()
    config.update(
        network="tiny",
        width=4,
        image_size=48,
        train_examples=16,
        test_examples=6,
        total_steps=4,
        warmup_steps=1,
        flip=True,
        crop_padding=2,
        eval_batch_size=4,
    )
    return config


def test_a_run_and_its_evaluation(tiny, tmp_path):
    summary = loop.train(tiny, tmp_path)
    assert summary["headline"] == "test_moving_miou" and summary["steps"] == 4
    assert 0 < summary["test_moving_miou"] < summary["test_moving_dice"] < 1
    experiment = build(tiny)
    state, task = trained_on.last_state(tmp_path, experiment), experiment.task
    precise = {"precise": recompute(tiny, experiment, state, 1)}
    out = segments.numbers(task, state, task.test, precise)
    assert f"{summary['test_moving_miou']:.4f}" in out and out.endswith("precise")
    assert f"{summary['test_batch_dice']:.4f}" in out
    out = segments.by_class(task, state, task.test, tmp_path / "segments")
    assert out.split("\n")[2].startswith("background")
    lines = (tmp_path / "segments.csv").read_text().splitlines()
    assert lines[0] == "class,pixels,IoU A,Dice A,IoU B,Dice B" and len(lines) == 12
    assert sum(int(line.split(",")[1]) for line in lines[1:]) == 6 * 48 * 48
    assert (tmp_path / "segments.png").stat().st_size > 10_000
    exported = programs.export(task, state.variables)
    program = jax.export.deserialize(exported.programs["network.stablehlo"])
    logits = jax.jit(program.call)(task.test.images[:2])
    predicted = task.predict(state, task.test.images[:2])
    np.testing.assert_array_equal(np.argmax(logits, -1), predicted)
    shape = (2, *exported.described["output"]["shape"][1:])
    assert logits.shape == shape == (2, 48, 48, 11) and exported.plain
    with pytest.raises(ValueError, match="classification, not of Segmentation"):
        of_kind(task, Classification)


@pytest.mark.slow
def test_the_commands(tmp_path):
    small = ("width=4", "train_examples=16", "test_examples=6", "image_size=48")
    keys = [f"--config.{key}" for key in (*small, "total_steps=2", "warmup_steps=1")]
    config = "--config=configs/experiments/scenes_segmentation.py"
    run("train", config, f"--workdir={tmp_path}", "--config.norm=batch", *keys)
    out = run("train.evaluate", f"--workdir={tmp_path}", "--precise_batches=1")
    assert "step 2, 6 test images" in out and "precise statistics of 1 tr" in out
    assert "segments_test.csv, .png" in out
    for module, flag, message in (
        ("train.evaluate", "--example_weight=0.1", "example_weight is for classif"),
        ("train.statistics", "--images=1", "classification, not of Segmentation"),
    ):
        assert message in run(module, f"--workdir={tmp_path}", flag, status=1)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(network="unet_tiny"), "network is 'unet_tiny'; expected one of"),
        (dict(dataset="digits"), "dataset is 'digits'; expected one of .'scenes', 'p"),
        (dict(dataset="pairs"), "dataset is 'pairs'; pass --data_dir=DIR"),
        (dict(sort_batches=True), "sort_batches is True, but an image has"),
        (dict(task="classification"), "network is 'unet_small', which is for the task"),
    ],
)
def test_what_cannot_be(overrides, message):
    config = scenes_segmentation.get_config()
    config.update(overrides)
    with pytest.raises(ValueError, match=message):
        build(config)
