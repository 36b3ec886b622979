"""Images of every kind come out as people see them, or are refused by name."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from tests.train.data.pictures import encoded
from train.data.encoded import Encoded, decode
from train.data.pixels import FORMATS, MAX_PIXELS, check_file, open_image, to_rgb

#: a grey ramp, 16 pixels wide, and a colour picture whose corners differ
RAMP = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (12, 1))
COLOURS = np.stack([RAMP, RAMP[::-1, ::-1] // 2, 40 + 10 * np.indices((12, 16))[0]], -1)
COLOURS = COLOURS.astype(np.uint8)


def pixels(data, max_pixels=MAX_PIXELS):
    with open_image(io.BytesIO(data), max_pixels) as image:
        return np.asarray(to_rgb(image))


def refused(data, match):
    with pytest.raises(ValueError, match=match):
        pixels(data)


def tiff(values, photometric=1, bits=None, sample_format=1, order="<"):
    """An uncompressed TIFF of one channel, written by hand."""
    height, width = values.shape
    data = values.tobytes()
    bits = bits or 8 * values.itemsize
    entries = [
        (256, 3, width),
        (257, 3, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, height),
        (279, 4, len(data)),
        (339, 3, sample_format),
    ]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(
        order + "I", 8 + len(data)
    )
    tags = b"".join(
        struct.pack(order + "HHI", tag, kind, 1)
        + struct.pack(order + ("HH" if kind == 3 else "I"), *([n, 0][: 5 - kind]))
        for tag, kind, n in entries
    )
    return (
        head
        + data
        + struct.pack(order + "H", len(entries))
        + tags
        + struct.pack("I", 0)
    )


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "webp", "gif"])
def test_ordinary_images_keep_their_numbers(kind):
    """To the bit what `convert` and `resize` of Pillow make of them."""
    box = (1.5, 0.5, 14.0, 11.0)
    for mode in ("RGB", "L"):
        data = encoded(Image.fromarray(COLOURS).convert(mode), kind)
        plain = Image.open(io.BytesIO(data)).convert("RGB")
        np.testing.assert_array_equal(pixels(data), plain)
        small = plain.resize((7, 7), Image.Resampling.BILINEAR, box=box)
        np.testing.assert_array_equal(decode(data, lambda *_: box, 7), small)


GREYS = {
    "png": encoded(Image.fromarray(RAMP.astype(np.uint16) * 257)),
    "tiff": tiff(RAMP.astype(np.uint16) * 257),
    "tiff, big-endian": tiff((RAMP.astype(np.uint16) * 257).astype(">u2"), order=">"),
    "tiff, white is 0": tiff(65535 - RAMP.astype(np.uint16) * 257, photometric=0),
    "tiff, floats": tiff((RAMP / 255).astype(np.float32), sample_format=3),
    "tiff, floats, white is 0": tiff(
        (1 - RAMP / 255).astype(np.float32), photometric=0, sample_format=3
    ),
    "pgm": b"P5 16 12 65535\n" + (RAMP.astype(">u2") * 257).tobytes(),
    "pgm of 10 bits": b"P5 16 12 1023\n"
    + (RAMP / 255 * 1023).round().astype(">u2").tobytes(),
    "pfm": b"Pf\n16 12\n-1.0\n" + (RAMP[::-1] / 255).astype("<f4").tobytes(),
    "jp2": encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), "jpeg2000"),
}


@pytest.mark.parametrize("kind", GREYS)
def test_numbers_of_more_bits_are_rescaled(kind):
    np.testing.assert_array_equal(pixels(GREYS[kind]), np.dstack([RAMP] * 3))


def test_twelve_bits():
    """Two numbers in three bytes; Pillow gives them as 16 bits that end at 4095."""
    values = (RAMP / 255 * 4095).round().astype(int)
    first, second = values[:, ::2], values[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1)
    data = tiff(packed.reshape(12, 24).astype(np.uint8), bits=12)
    widths = [struct.pack("<HHIHH", 256, 3, 1, width, 0) for width in (24, 16)]
    np.testing.assert_array_equal(pixels(data.replace(*widths)), np.dstack([RAMP] * 3))


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int16, np.int8])
def test_integers_of_an_unknown_white_are_refused(dtype):
    sample_format = 1 if dtype is np.uint32 else 2
    refused(tiff(RAMP.astype(dtype), sample_format=sample_format), "integers")


@pytest.mark.parametrize("worst", [255.0, -0.5, np.nan, np.inf])
def test_floats_beyond_0_to_1_are_refused(worst, tmp_path):
    values = (RAMP / 255).astype(np.float32)
    values[3, 3] = worst
    data = tiff(values, sample_format=3)
    refused(data, "floats from .*; expected 0, for black, to 1")
    (tmp_path / "x.tif").write_bytes(data)
    with pytest.raises(ValueError, match="floats"):
        check_file(tmp_path / "x.tif", MAX_PIXELS)


# What each number asks a viewer to do, in NumPy's words.
TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "jpeg, large"])
@pytest.mark.parametrize("turn", [*TURNS, 9])
def test_orientation(kind, turn):
    """The box is of the picture as it is seen; a large JPEG is decoded at an eighth."""
    if turn in (2, 7) and "," in kind:
        return
    exif = Image.Exif()
    exif[0x0112] = turn
    grow = 40 if "large" in kind else 1
    stored = Image.fromarray(COLOURS).resize((16 * grow, 12 * grow))
    options = {"lossless": True} if kind == "webp" else {}
    options |= {"quality": 100, "subsampling": 0} if "jpeg" in kind else {}
    data = encoded(stored, kind.partition(",")[0], exif=exif, **options)
    seen = TURNS.get(turn, TURNS[1])(np.asarray(stored))
    asked = []

    def box(width, height):
        asked.append((width, height))
        return (width / 4, height / 2, width, height)

    height, width = seen.shape[:2]
    expected = Image.fromarray(np.ascontiguousarray(seen)).resize(
        (8, 8), Image.Resampling.BILINEAR, box=box(width, height)
    )
    out = decode(data, box, 8)
    assert asked[0] == asked[1]
    atol = 4 if "jpeg" in kind else 0
    np.testing.assert_allclose(np.int16(out), np.int16(expected), atol=atol)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_says_nothing():
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20)
    data = encoded(Image.fromarray(COLOURS), "jpeg", exif=exif)
    without = encoded(Image.fromarray(COLOURS), "jpeg")
    np.testing.assert_array_equal(pixels(data), pixels(without))


def transparent(mode):
    """A picture whose left half is red and clear, its right half black and opaque."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 255))
    image.paste((255, 0, 0, 0), (0, 0, 4, 4))
    if mode == "RGBA":
        return encoded(image)
    if mode == "gif":
        return encoded(image, "gif")
    if mode == "half":
        image.paste((0, 0, 0, 128), (0, 0, 4, 4))
        return encoded(image)
    if mode == "LA":
        return encoded(image.convert("LA"))
    value = np.zeros((4, 8), np.uint8)
    value[:, :4] = 7
    if mode == "P":
        return encoded(Image.fromarray(value).convert("P"), transparency=7)
    if mode == "palette with alphas":
        indexed = Image.fromarray(value).convert("P")
        return encoded(indexed, transparency=bytes([255] * 7 + [0]))
    if mode == "RGB":
        return encoded(Image.fromarray(np.dstack([value] * 3)), transparency=(7, 7, 7))
    if mode == "L":
        return encoded(Image.fromarray(value), transparency=7)
    if mode == "I;16":
        return encoded(Image.fromarray(value.astype(np.uint16)), transparency=7)
    raise AssertionError(mode)


@pytest.mark.parametrize(
    "mode",
    ["RGBA", "half", "LA", "P", "palette with alphas", "RGB", "L", "I;16", "gif"],
)
def test_what_is_transparent_is_white(mode):
    out = pixels(transparent(mode))
    clear = 127 if mode == "half" else 255
    np.testing.assert_array_equal(out[:, :4], np.full((4, 4, 3), clear))
    np.testing.assert_array_equal(out[:, 4:], np.zeros((4, 4, 3)))


def test_one_bit_and_inks():
    bits = Image.fromarray(RAMP > 127)
    expected = np.dstack([255 * (RAMP > 127)] * 3)
    for kind in ("png", "tiff", "bmp"):
        np.testing.assert_array_equal(pixels(encoded(bits, kind)), expected)
    inks = Image.fromarray(COLOURS).convert("CMYK")
    for kind in ("jpeg", "tiff"):
        options = {"quality": 100, "subsampling": 0} if kind == "jpeg" else {}
        out = pixels(encoded(inks, kind, **options))
        np.testing.assert_allclose(np.int16(out), np.int16(COLOURS), atol=4)
    refused(encoded(Image.fromarray(COLOURS).convert("LAB"), "tiff"), "LAB; save it")


@pytest.mark.parametrize("kind", ["gif", "webp", "tiff", "png", "mpo"])
def test_of_several_images_the_first(kind, tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "webp" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_allclose(pixels(data)[0, 0], [255, 0, 0], atol=3)
    (tmp_path / "several").write_bytes(data)
    assert check_file(tmp_path / "several", MAX_PIXELS) is True
    (tmp_path / "one").write_bytes(encoded(frames[0], kind))
    assert check_file(tmp_path / "one", MAX_PIXELS) is False


def test_every_format_of_the_list_is_read():
    kinds = ("jpeg", "png", "bmp", "gif", "webp", "ppm", "tiff", "jpeg2000")
    avif = ("avif",) if "AVIF" in FORMATS else ()
    assert {k.upper() for k in kinds + avif} == set(FORMATS)
    for kind in kinds + avif:
        data = encoded(Image.new("RGB", (16, 16), (200, 100, 50)), kind)
        np.testing.assert_allclose(pixels(data)[8, 8], (200, 100, 50), atol=4)


@pytest.mark.parametrize(
    "data, match",
    [
        (encoded(Image.fromarray(COLOURS), "tga"), "expected one of JPEG, PNG"),
        (encoded(Image.fromarray(COLOURS), "ico"), "expected one of JPEG, PNG"),
        (encoded(Image.fromarray(COLOURS), "eps"), "expected one of JPEG, PNG"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC, which is not read. Save it as PNG"),
        (b"\xff\x0a" + bytes(40), "JPEG XL, which is not read"),
        (tiff(RAMP / 255, sample_format=3), "damaged, or rare. Save it as PNG"),
        (b"", "the file is empty"),
        (b"not an image", "it is none"),
    ],
)
def test_other_formats_are_refused(data, match, tmp_path):
    refused(data, match)
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=match):
        check_file(tmp_path / "x.jpg", MAX_PIXELS)


def test_the_limit_of_pixels_comes_before_decoding(monkeypatch):
    data = encoded(Image.new("L", (300, 200)))
    assert pixels(data, 60_000).shape == (200, 300, 3)
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(
        ValueError, match=r"300 x 200 is 60,000 pixels; .* at most 59,999.*max_pixels"
    ):
        pixels(data, 59_999)
    split = Encoded([(data, 0, "dir/large.png")], 8, 1, max_pixels=59_999)
    with pytest.raises(ValueError, match=r"dir/large\.png .*300 x 200.*max_pixels"):
        split.read(np.arange(1))


@pytest.mark.parametrize(
    "kind", ["jpeg", "png", "gif", "webp", "tiff", "bmp", "ppm", "jpeg2000"]
)
def test_truncated_files_are_refused_by_name(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    cut = data[: len(data) // 2]
    split = Encoded([(cut, 0, "dir/cut")], 8, 1)
    with pytest.raises(ValueError, match="image dir/cut cannot be decoded"):
        split.read(np.arange(1))
    path = tmp_path / "file"
    for content in (data, data + b"more"):
        path.write_bytes(content)
        assert check_file(path, MAX_PIXELS) is False
    path.write_bytes(cut)
    with pytest.raises((ValueError, OSError)):
        check_file(path, MAX_PIXELS)
