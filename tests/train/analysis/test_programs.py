"""Exported detectors: programs that run without this project, and variables for plain
layers."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kalman_flax.models.detection.roi_align import roi_align
from tests.models.detection.test_mask_rcnn import build as build_network
from tests.models.detection.test_mask_rcnn import filled
from tests.reference.plain_detector import PlainDetector
from tests.train.data.coco_files import make_coco
from tests.train.data.pictures import put
from tests.train.engine.test_detection import coco_config, detection_config
from train.analysis import programs
from train.analysis.detections import find
from train.data.batches import Standardize
from train.data.objects import Canvases, Categories
from train.data.picture_files import PictureFiles
from train.data.pixels import MAX_PIXELS
from train.engine import detector
from train.engine.detection import Detection, scales
from train.engine.experiment import build
from train.engine.mesh import make_mesh

PAGE = pathlib.Path("docs/detection.md").read_text()


def test_the_snippet_of_the_documents_finds_what_detect_finds(
    tmp_path, monkeypatch, capsys
):
    """On canvases of both kinds, with a network that stands in for a detector."""
    config = coco_config()
    experiment = build(config, str(make_coco(tmp_path)), devices=jax.devices()[:1])
    task, state = experiment.task, experiment.state
    exported = programs.export(task, state.variables)
    assert exported.plain.norm == "flax.linen.BatchNorm(epsilon=1e-05)"
    files = {
        **exported.programs,
        "metadata.json": json.dumps(exported.described).encode(),
    }
    assert set(files) >= {"network_32x64.stablehlo", "network_64x32.stablehlo"}
    for name, content in files.items():
        put(tmp_path / "exported" / name, content)
    [snippet] = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    assert "kalman_flax" not in snippet
    monkeypatch.chdir(tmp_path)
    names = dict(zip(task.categories.ids, task.categories.names))
    photo = tmp_path / "photo.jpg"
    for shape in ((60, 90), (70, 50)):
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        Image.fromarray(pixels).save(photo)
        looked_at = PictureFiles([photo], scales(config)[1], MAX_PIXELS)
        expected = find(task, state, looked_at)["annotations"][::-1]
        exec(snippet, {})
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == len(expected) > 0
        for line, each in zip(lines, expected):
            name, score, *box = re.sub(r"[\[\]]", "", line).split()
            assert name == names[each["category_id"]]
            assert float(score) == pytest.approx(each["score"], abs=1e-3)
            x, y, width, height = each["bbox"]
            corners = [x, y, x + width, y + height]
            np.testing.assert_allclose(np.float64(box), corners, atol=0.1)


RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (2, 64, 64, 3), np.uint8)
SIZE = np.array([[64, 64], [50, 57]], np.int32)


def real_task(name):
    """A tiny Mask R-CNN, and its variables."""
    network = build_network(name, normalizer={"momentum": 0.9})
    task = Detection(
        detection_config(),
        make_mesh(1),
        Categories((1, 2, 3), ("a", "b", "c")),
        network,
        Standardize(np.float32(100), np.float32(50)),
        None,
    )
    return task, filled(network)


@pytest.mark.slow  # beside the snippet, which runs both canvases
def test_an_exported_detector_finds_what_the_model_finds(monkeypatch):
    """The real network, which anybody's number of canvases goes through."""
    monkeypatch.setattr(programs.stablehlo, "plain_variables", lambda *_: None)
    task, variables = real_task("kalman")
    [serialized] = programs.export(task, variables).programs.values()
    program = jax.jit(jax.export.deserialize(serialized).call)
    inputs = detector.prepare(Canvases(IMAGE, SIZE), task.standardize)
    model = jax.jit(detector.infer, static_argnums=0)
    expected = model(task.network, variables, inputs)
    assert np.all(expected.labels[:, 0] > 0)
    for name, value in program(IMAGE, SIZE).items():
        np.testing.assert_allclose(
            value, getattr(expected, name), rtol=1e-4, atol=1e-3, err_msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kalman_wc", "frozen_batch"])
def test_the_variables_of_a_detector_are_those_of_plain_layers(name):
    """`jax.lax` alone gives the same proposals, logits, deltas and masks. RoIAlign,
    which has its own oracle, cuts the crops."""
    task, variables = real_task(name)
    exported = programs.export(task, variables)
    inputs = detector.prepare(Canvases(IMAGE[:1], SIZE[:1]), task.standardize)
    boxes = np.float32([[[3, 5, 40, 50], [10, 10, 21, 33], [0, 30, 64, 60]]])

    @jax.jit
    def model(inputs):
        def say(network):
            parts = network._parts(inputs, True)
            vectors, outlines = parts.describe(boxes, jnp.ones(boxes.shape[:2], bool))
            heads = *parts.box_head(vectors), parts.mask_head(outlines)
            return (*parts.objectness, *parts.deltas, *(x[0] for x in heads))

        return task.network.apply(variables, method=lambda network: say(network))

    @jax.jit
    def plain(variables, image):
        plain = PlainDetector(variables)
        features = plain.features((image - 100.0) / 50)
        crops = roi_align(features[0], boxes[0], SIZE[0] // 8, stride=8, output=8)
        return (*plain.rpn(features), *plain.heads(crops))

    with jax.default_matmul_precision("highest"):
        said = model(inputs)
    for x, y in zip(plain(exported.plain.variables, IMAGE[:1]), said, strict=True):
        scale = float(np.abs(y).max())
        np.testing.assert_allclose(x, y, atol=1e-4 * scale, rtol=1e-4)
