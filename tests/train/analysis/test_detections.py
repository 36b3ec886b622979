"""What a detector finds, drawn and written; with a network that stands in for one."""

import colorsys
import json

import jax
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from tests.train.command import run as command
from tests.train.common import REAL, tiny_config
from tests.train.data.pictures import encoded, put
from tests.train.engine.test_detection import coco_config, detection_config
from train.analysis.coco_table import by_option, coco_table
from train.analysis.detections import draw_all, find, restore
from train.analysis.draw import colour, draw
from train.data.annotations import encode
from train.data.picture_files import PictureFiles, find_images
from train.data.pixels import MAX_PIXELS
from train.engine import loop
from train.engine import workdir as wd
from train.engine.detection import scales
from train.engine.experiment import build
from train.engine.workdir import last_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one update, and some images of other shapes than the scenes."""
    root = tmp_path_factory.mktemp("run")
    config = detection_config(
        train_examples=2, test_examples=1, batch_size=2, epochs=1, micro_batch_size=2
    )
    loop.train(config, root / "run")
    for name, size in (("b.jpg", (90, 60)), ("a.png", (50, 70))):
        put(root / "images" / name, encoded(Image.new("RGB", size, "gray")))
    put(root / "images/notes.txt", b"no image")
    return config, root


def test_images_are_found_drawn_and_written(run, tmp_path):
    config, root = run
    paths = find_images(root / "images")
    assert [path.name for path in paths] == ["a.png", "b.jpg"]
    files = PictureFiles(paths, scales(config)[1], MAX_PIXELS)
    assert files.pictures.size.tolist() == [[64, 46], [43, 64]]
    task, state = restore(config, root / "run")
    content = json.loads(json.dumps(find(task, state, files)))
    (tmp_path / "found.json").write_text(json.dumps(content))
    coco = COCO(tmp_path / "found.json")
    shapes = [(each["height"], each["width"]) for each in coco.imgs.values()]
    assert shapes == [(70, 50), (60, 90)]
    scores = [each["score"] for each in content["annotations"]]
    assert len(scores) == 4 and scores[:2] == sorted(scores[:2])
    for each in content["annotations"]:
        x, y, w, h = each["bbox"]
        height, width = shapes[each["image_id"] - 1]
        assert 0 <= x < x + w <= width + 1e-4 and 0 <= y < y + h <= height + 1e-4
        assert coco.annToMask(each).shape == (height, width)
    assert draw_all(files, content, max(scores), tmp_path) == 1
    for name, shape in (("a.png", (70, 50)), ("b.jpg", (60, 90))):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == shape[::-1]


def test_the_detector_is_that_of_the_run(run):
    config, root = run
    _, state = restore(config, root / "run")
    whole = last_checkpoint(root / "run", build(config).state)
    jax.tree.map(np.testing.assert_array_equal, state.variables, whole.variables)


def test_the_commands(run, tmp_path):
    """Neither asks for the data that the run was trained on."""
    _, root = run
    workdir, to = f"--workdir={root}/run", f"--output={tmp_path}/found"
    out = command("train.detect", workdir, f"--images={root}/images", to)
    assert "step 1: 4 objects on 2 images, " in out and "score of 0.5 or more" in out
    assert {path.name for path in (tmp_path / "found").iterdir()} == {
        "a.png.png",
        "b.jpg.png",
        "detections.json",
    }
    out = command("train.export", workdir, f"--output={tmp_path}/exported")
    summary = json.loads((root / "run/summary.json").read_text())
    assert f"step 1, test box AP {summary['test_moving_box_AP']:.4f}\n" in out
    assert "network_64x64.stablehlo, variables.npz, metadata.json\n" in out
    metadata = json.loads((tmp_path / "exported/metadata.json").read_text())
    assert metadata["test"]["images"] == 1
    assert metadata["test"]["mask_AR100"] == summary["test_moving_mask_AR100"]
    assert metadata["networks"] == [
        {"file": "network_64x64.stablehlo", "canvas": [64, 64]}
    ]
    (tmp_path / "other").mkdir()
    wd.claim(tmp_path / "other", tiny_config(**REAL))
    other = f"--workdir={tmp_path}/other"
    out = command("train.detect", other, f"--images={root}/images", status=1)
    assert out.endswith("'classification', not detection.\n")


def test_what_cannot_be_looked_at(run, tmp_path):
    config, root = run
    with pytest.raises(FileNotFoundError, match=r"no .*nowhere; expected an image"):
        find_images(tmp_path / "nowhere")
    put(tmp_path / "notes.txt", b"no image")
    with pytest.raises(FileNotFoundError, match=r"no images in .*; expected JPEG"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match=r"image .*notes.txt cannot be used: expected"):
        _ = PictureFiles([tmp_path / "notes.txt"], scales(config)[1], 9).pictures
    with pytest.raises(ValueError, match=r"there is no data.json in"):
        restore(config, tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        kept = (root / "run/data.json").read_text()
        (tmp_path / "data.json").write_text(kept)
        restore(config, tmp_path)


def test_a_drawing():
    mask = np.zeros((80, 90), bool)
    mask[50:60, 30:50] = True
    found = {"bbox": [28, 48, 24, 14], "segmentation": encode(mask), "category_id": 7}
    pixels = np.full((80, 90, 3), 100, np.uint8)
    drawn = np.asarray(draw(pixels, [found], {7: "cat"})).astype(int)
    assert (drawn[[48, 61], 28:52] == colour(7)).all()
    inside = drawn[50:60, 30:50]
    expected = 0.55 * 100 + 0.45 * np.array(colour(7))
    np.testing.assert_allclose(inside, np.broadcast_to(expected, inside.shape), atol=1)
    assert (drawn[64:] == 100).all() and (drawn[30:48, 28:60] != 100).any()
    hues = sorted(colorsys.rgb_to_hsv(*colour(i))[0] for i in range(1, 11))
    assert np.diff(hues).min() > 0.03


def test_numbers_in_a_table():
    found = {"moving_box_AP": 0.37125, "batch_mask_AR_large": 0.5}
    lines = coco_table({o[0].upper(): by_option(found, o) for o in ("moving", "batch")})
    head, first, *_, last = lines.splitlines()
    assert head.split() == ["box,", "M", "mask,", "M", "box,", "B", "mask,", "B"]
    assert first.split() == ["AP", "0.3713", "-", "-", "-"] or "0.3712" in first
    assert last.split() == ["AR_large", "-", "-", "-", "0.5000"]
    assert len(lines.splitlines()) == 13


def test_coco_scales_of_tests():
    config = coco_config(test_short_side=48)
    train, test = scales(config)
    assert (train.short, test.short, test.long) == (32, 48, 56)
