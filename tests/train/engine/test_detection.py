"""The task of detection, with a network that stands in for a detector."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kalman_flax.baselines import FrozenBatchNorm
from kalman_flax.models.detection.mask_rcnn import MaskRCNN
from kalman_flax.models.detection.recipe import Recipe
from tests.train.common import build, tiny_config
from tests.train.data.coco_files import make_coco
from tests.train.engine.fake_detector import SLOTS
from train.data.batches import Standardize
from train.data.objects import Canvases
from train.engine import detector, loop, metrics, optimizer, settings, trained_on
from train.engine import workdir as wd
from train.engine.detection import LOSSES, Detection, mirror
from train.engine.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("built_once")


def detection_config(**overrides):
    options = dict(
        task="detection",
        dataset="scenes",
        network="fake",
        plugins=("tests.train.engine.fake_detector",),
        norm="batch",
        image_size=64,
        train_examples=16,
        test_examples=5,
        batch_size=4,
        micro_batch_size=1,
        eval_batch_size=2,
        learning_rate=0.01,
        log_steps=1,
        flip=True,
    )
    return tiny_config(**options | overrides)


def coco_config(**overrides):
    options = dict(
        dataset="coco",
        train_examples=0,
        test_examples=0,
        short_side=32,
        long_side=56,
        canvas_multiple=16,
        batch_size=2,
    )
    return detection_config(**options | overrides)


def test_scenes_train_test_and_resume(tmp_path):
    """A run that was cut off ends where one that was not does."""
    config = detection_config(batch_size=2, train_examples=4, epochs=3)
    summary = loop.train(config, tmp_path / "whole")
    assert summary["headline"] == "test_moving_box_AP"
    assert 0 <= summary["test_moving_box_AP"] <= 1
    assert {"test_batch_mask_AR100", "test_moving_box_AP50"} <= summary.keys()
    lines = metrics.read_metrics(tmp_path / "whole")
    first = lines[0]
    parts = sum(first[f"train_{name}"] for name in LOSSES[:-1])
    assert first["train_loss"] == pytest.approx(parts, rel=1e-5)

    class Cut(Exception):
        pass

    def cut(*_):
        raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "finish", cut)
        with pytest.raises(Cut):
            loop.train(config, tmp_path / "cut")
    for step in (4, 6):  # back to the first epoch
        checkpoint = tmp_path / f"cut/checkpoints/{step}"
        for path in sorted(checkpoint.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        checkpoint.rmdir()
    again = loop.train(config, tmp_path / "cut")
    assert again["final_train_loss"] == summary["final_train_loss"]
    assert again["test_moving_box_AP"] == summary["test_moving_box_AP"]
    whole, cut = (
        wd.last_checkpoint(tmp_path / name, build(config).state).params
        for name in ("whole", "cut")
    )
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


def test_a_coco_directory_trains_and_is_known_again(tmp_path):
    root, run = str(make_coco(tmp_path / "coco")), tmp_path / "run"
    config = coco_config(epochs=2)
    summary = loop.train(config, run, root)
    assert (summary["train_images"], summary["test_images"]) == (4, 2)
    experiment = build(config, root)
    landscape, portrait = (
        experiment.task.train.pictures.canvas[experiment.task.order()(step)]
        for step in (0, 3)  # one of four images is portrait
    )
    assert (landscape == (32, 64)).all() and (portrait == (64, 32)).all()
    kept = trained_on.check(run, experiment.task)
    assert kept["categories"] == {"3": "cat", "17": "dog", "90": "kite"}
    assert set(kept["images"]["train"]) >= {"sha256", "by_class"}
    assert trained_on.check(run, experiment.task, files=True)["files"].keys() == {
        "train2017",
        "val2017",
    }
    (tmp_path / "coco/train2017/00012.png").write_bytes(
        (tmp_path / "coco/train2017/00011.png").read_bytes() + b"more"
    )
    with pytest.raises(ValueError, match="not what the run was trained on: train has"):
        trained_on.check(run, build(config, root).task)


def test_a_network_without_its_data(tmp_path):
    config = coco_config()
    experiment = build(config, str(make_coco(tmp_path)))
    task = experiment.task
    again = Detection.without_data(config, make_mesh(2), task.check_data(None))
    assert again.categories == task.categories
    assert again.network.num_classes == 3
    np.testing.assert_array_equal(again.standardize.mean, task.standardize.mean)


def test_detections_are_those_of_the_network():
    """Every image once, whatever the batches; option B is each image by itself."""
    config = detection_config()
    experiment = build(config, devices=jax.devices()[:2])
    task, state = experiment.task, jax.device_get(experiment.state)
    found = dict(task.detect(experiment.state, task.test))
    assert sorted(found) == [0, 1, 2, 3, 4]
    for example, options in found.items():
        canvases = task.test.read_canvases(np.array([example]))
        inputs = detector.prepare(canvases, task.standardize)
        for option, moving in (("moving", True), ("batch", False)):
            out = task.network.apply(
                state.variables, inputs, moving, mutable=["batch_stats"]
            )[0]
            for x, y in zip(options[option], out):
                np.testing.assert_allclose(x, y[0], rtol=1e-4, atol=1e-5)
    assert len(task.results(task.test, 0, found[0]["moving"])) == SLOTS - 1


def test_devices_and_parts_change_nothing():
    def trained(devices, accumulate):
        config = detection_config(accumulate=accumulate)
        experiment = build(config, devices=jax.devices()[:devices])
        state = experiment.state
        for step in range(2):
            state, metrics = experiment.train_step(state, experiment.batch(step))
        return jax.device_get((state.params, state.batch_stats, metrics))

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        trained(2, 2),
        trained(1, 1),
    )


def test_outside_of_an_image_is_zero():
    random = np.random.default_rng(0)
    image = random.integers(0, 255, (2, 6, 9, 3)).astype(np.uint8)
    canvases = Canvases(image, np.array([[6, 5], [2, 9]]))
    found = detector.prepare(canvases, Standardize(np.float32(7), np.float32(3)))
    for row, (height, width) in enumerate(canvases.size):
        expected = np.zeros((6, 9, 3))
        expected[:height, :width] = (image[row, :height, :width].astype(float) - 7) / 3
        np.testing.assert_allclose(found["image"][row], expected, rtol=1e-6)


def test_mirrored_images_are_those_of_a_mirrored_directory(tmp_path):
    """But for the rounding of the resized pixels."""
    task = build(coco_config(), str(make_coco(tmp_path))).task
    index = np.flatnonzero(task.train.pictures.ids != 12)
    batch = task.train.read(index)
    found = jax.jit(mirror)(batch, np.array([True, False, True]))
    for row, flipped in enumerate((True, False, True)):
        if not flipped:
            for x, y in zip(found, batch):
                np.testing.assert_array_equal(x[row], y[row])
            continue
        height, width = batch.size[row]
        image = batch.image[row, :height, :width]
        np.testing.assert_array_equal(found.image[row, :height, :width], image[:, ::-1])
        assert not found.image[row, :, width:].any()
        for slot, label in enumerate(batch.labels[row]):
            x1, y1, x2, y2 = batch.boxes[row, slot]
            expected = (width - x2, y1, width - x1, y2) if label else (0, 0, 0, 0)
            np.testing.assert_allclose(found.boxes[row, slot], expected, rtol=1e-6)
            mask = batch.masks[row, slot]
            np.testing.assert_array_equal(found.masks[row, slot], mask[:, ::-1])
        np.testing.assert_array_equal(found.labels[row], batch.labels[row])
    twice = mirror(jax.tree.map(jnp.asarray, found), np.array([True, False, True]))
    for x, y in zip(twice, batch):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["scenes_detection", "coco_c4", "coco_short"])
def test_configs(name):
    config = importlib.import_module(f"configs.experiments.{name}").get_config()
    config.init_from = "a checkpoint"
    assert settings.check(config) == config.batch_size == 8
    network = detector.make_detector(config, 80)
    assert type(network) is MaskRCNN and network.num_classes == 80
    if name == "scenes_detection":
        assert network.recipe == Recipe.small()
        return
    assert network.recipe == Recipe() and network.freeze_at == 2
    recipe = Recipe(candidates=9, proposals=4, detection_candidates=9, detections=2)
    network = network.clone(recipe=recipe, norm=FrozenBatchNorm)
    inputs = {"image": np.zeros((1, 64, 96, 3)), "size": np.array([[64, 96]])}
    shapes = jax.eval_shape(
        lambda: network.init(jax.random.key(0), inputs, use_running_average=True)
    )
    frozen = optimizer.labels(shapes["params"], config.freeze)
    assert {
        name.partition("_")[0]
        for name, labels in frozen.items()
        if "freeze" in jax.tree.leaves(labels)
    } == {"stem", "stage1"}
    assert sum(jax.tree.leaves(jax.tree.map(lambda x: x == "freeze", frozen))) == 33


def test_options_are_of_the_network_or_of_its_recipe():
    config = detection_config(network_options={"sampled": 0.5}, width=8)
    network = build(config).task.network
    assert (network.recipe.sampled, network.width) == (0.5, 8)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(dataset="digits"), r"dataset is 'digits'; expected one of .*'coco'"),
        (dict(network="resnet5"), r"network is 'resnet5'; expected one of"),
        (dict(crop_padding=4), r"crop_padding is 4, but task 'detection' does not"),
        (dict(sort_batches=True), "sort_batches is True, but task"),
        (
            dict(dataset="coco", short_side=64, long_side=32),
            "long_side 32 is less than short_side 64",
        ),
        (dict(dataset="coco"), "dataset is 'coco'; pass --data_dir=DIR"),
        (
            dict(network_options={"num_classes": 3}),
            "network_options sets num_classes, which the data set sets",
        ),
        (
            dict(network="mask_rcnn_small", network_options={"freeze_at": 2}),
            r"freeze_at is 2, but freeze is empty",
        ),
        (
            dict(
                network="mask_rcnn_small",
                network_options={"freeze_at": 2},
                freeze=("stem*",),
            ),
            r"freeze_at is 2, but init_from is empty",
        ),
        (
            dict(network="unet_small"),
            "'unet_small', which is for the task 'segmentation'; task is 'detection',"
            " whose networks are mask_rcnn_c4",
        ),
        (
            dict(network_options={"rois": 3}),
            r"network_options sets .'rois'.; 'fake' has .'sampled'.",
        ),
    ],
)
def test_what_cannot_be(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(detection_config(**overrides))
