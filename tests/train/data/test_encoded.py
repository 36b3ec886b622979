"""Cropping and decoding images that stay on disk."""

import numpy as np
import pytest
from PIL import Image

from tests.train.data.pictures import encoded
from train.data.encoded import Encoded, centre_box, decode, random_box


def ramp(width, height):
    """Red tells the column and green the row, from 0 to 250."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 250, width)
    image[..., 1] = np.linspace(0, 250, height)[:, None]
    return Image.fromarray(image)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("width", [60, 200, 1600])
def test_decode_cuts_out_the_box(kind, width):
    """At 1600 pixels a JPEG is decoded at a fraction of its size."""
    height = width // 2
    box = (0.1 * width, 0.2 * height, 0.7 * width, 0.9 * height)
    options = {"quality": 95, "subsampling": 0} if kind == "jpeg" else {}
    data = encoded(ramp(width, height), kind, **options)
    out = decode(data, lambda *size: box, 24)
    at = (np.arange(24) + 0.5) / 24
    red, green = 250 * (0.1 + 0.6 * at), 250 * (0.2 + 0.7 * at)
    np.testing.assert_allclose(out[..., 0], np.tile(red, (24, 1)), atol=6)
    np.testing.assert_allclose(out[..., 1], np.tile(green[:, None], 24), atol=6)
    assert out.shape == (24, 24, 3) and out.dtype == np.uint8


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_every_kind_of_image_becomes_rgb(mode):
    kind = "jpeg" if mode == "CMYK" else "png"
    data = encoded(Image.new("RGB", (40, 30), (60, 60, 60)).convert(mode), kind)
    np.testing.assert_allclose(decode(data, centre_box, 8), 60, atol=2)


def test_the_centre_is_224_of_256():
    assert centre_box(256, 256) == (16, 16, 240, 240)
    assert centre_box(512, 256) == (144, 16, 368, 240)


def test_random_boxes():
    """Inside, of 8 to 100 % of the area and 3/4 to 4/3 in aspect; all of it is used."""
    random = np.random.default_rng(0)
    boxes = np.array([random_box(random)(500, 375) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    assert left.min() == 0 and top.min() == 0
    assert right.max() == 500 and bottom.max() == 375
    area, ratio = (
        (right - left) * (bottom - top) / 500 / 375,
        (right - left) / (bottom - top),
    )
    assert 0.078 < area.min() < 0.1 and 0.9 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.35


def test_a_box_of_an_image_too_long_for_any():
    assert random_box(np.random.default_rng(0))(1000, 30) == (480, 0, 520, 30)


def test_crops_depend_on_key_and_example_alone():
    source = [(encoded(ramp(64, 48)), i, str(i)) for i in range(4)]
    split = Encoded(source, 16, 4)
    images, labels = split.read(np.array([2, 1, 1]), key=(0, 5))
    np.testing.assert_array_equal(labels, [2, 1, 1])
    np.testing.assert_array_equal(images[1], images[2])
    assert np.any(images[0] != images[1])
    np.testing.assert_array_equal(
        split.read(np.array([1]), key=(0, 5)).images[0], images[1]
    )
    assert np.any(split.read(np.array([1]), key=(0, 6)).images[0] != images[1])
    centre = split.read(np.array([2, 1])).images
    np.testing.assert_array_equal(centre[0], centre[1])
    assert [split.take(count).examples for count in (2, 4, 0)] == [2, 4, 4]
