"""From the bytes of an image file to upright RGB pixels of 8 bits.

What a file is, its content says, never its name. Formats beyond `FORMATS` are refused,
as is every image whose black and white are not known.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import struct
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.Image import Transpose

#: Pillow's own limit; what a config says counts instead, see `open_image`
MAX_PIXELS = 89_478_485
Image.MAX_IMAGE_PIXELS = None

#: that are decoded; PPM stands for PGM, PBM and PFM too
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM", "TIFF", "JPEG2000")
if features.check("avif"):
    FORMATS += ("AVIF",)
#: what shows through where an image is transparent: white
BACKGROUND = (255, 255, 255, 255)

_EIGHT_BITS = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK")
_WIDE = ("I;16", "I;16L", "I;16B", "I", "F")
_MODES = (*_EIGHT_BITS, "YCbCr", *_WIDE)
#: brands of HEIF's container, of which Pillow reads AVIF alone
_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_SIGNED = 2  # in TIFF's SampleFormat


def open_image(file: BinaryIO | pathlib.Path, max_pixels: int) -> Image.Image:
    """Opens an image; reads its header and decodes nothing.

    Of an animation or of several pages it is the first.

    Args:
        file: JPEG, PNG or what else `FORMATS` has.
        max_pixels: width times height, at most.

    Raises:
        ValueError: another format, too many pixels, or numbers of a kind whose black
            and white are not known; the message names no file.
        OSError: the file cannot be read.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(_why_unknown(file)) from None
    try:
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(
                f"{width} x {height} is {width * height:,} pixels; expected at most"
                f" {max_pixels:,}. Make it smaller, or set max_pixels."
            )
        _check_kind(image)
    except BaseException:
        image.close()
        raise
    return image


def _check_kind(image: Image.Image) -> None:
    tags = getattr(image, "tag_v2", {})
    if image.mode not in _MODES:
        raise ValueError(f"colours of the kind {image.mode}; save it as RGB.")
    if _SIGNED in _all(tags.get(ExifTags.Base.SampleFormat)):
        raise ValueError(
            "signed integers, of which nobody knows what is black and what is white;"
            " save it with 8 or 16 bits, unsigned."
        )
    if image.mode == "I" and image.format != "PPM":
        raise ValueError(
            "integers of 32 bits, of which nobody knows what is white; save it with 8"
            " or 16 bits."
        )


def _all(tag: object) -> tuple:
    return tag if isinstance(tag, tuple) else (tag,)


def _why_unknown(file: BinaryIO | pathlib.Path) -> str:
    if isinstance(file, pathlib.Path):
        with file.open("rb") as opened:
            head = opened.read(32)
    else:
        file.seek(0)
        head = file.read(32)
    if not head:
        return "the file is empty."
    kind = unread_format(head)
    found = f"{kind}, which is not read" if kind else "none, or damaged, or rare"
    return f"expected one of {', '.join(FORMATS)}; it is {found}. Save it as PNG."


def unread_format(head: bytes) -> str:
    """Returns the name of a format that cameras write and we do not read, or ""."""
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF:
        return "HEIC"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL"
    if head.startswith(b"8BPS"):
        return "Photoshop's"
    return ""


# by EXIF's number; 1 is as it is
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def orientation(image: Image.Image) -> int:
    """Returns how an image that was just opened is to be turned, as EXIF counts: 1 for
    not at all, 5 to 8 swap width and height."""
    # TIFF is turned by Pillow while it is decoded. A PNG may say it behind its pixels.
    if image.format == "TIFF":
        return 1
    # EXIF that is damaged says nothing, and the image is as good as without.
    with contextlib.suppress(
        SyntaxError, struct.error, ValueError, LookupError, TypeError, EOFError
    ):
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return found if found in _TURNS else 1
    return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns the pixels, upright, opaque, of 8 bits.

    Numbers of 16 bits are rescaled by what their type can hold, floats from 0 to 1;
    other floats are refused. What is transparent shows `BACKGROUND`.

    Args:
        image: of `open_image`.

    Raises:
        ValueError: floats outside of 0 to 1.
        Exception: what Pillow has for damaged files, of many types.
    """
    image.load()
    if (turn := orientation(image)) != 1:
        image = image.transpose(_TURNS[turn])
    if image.mode in _WIDE:
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        behind = Image.new("RGBA", image.size, BACKGROUND)
        image = Image.alpha_composite(behind, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Maps what is black to 0 and what is white to 255, rounded."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values).all() and 0 <= values.min() <= values.max() <= 1):
            raise ValueError(
                f"floats from {values.min():g} to {values.max():g}; expected 0, for"
                " black, to 1, for white."
            )
        white = 1
    else:
        [bits, *_] = _all(tags.get(ExifTags.Base.BitsPerSample, 16))
        white = 2**bits - 1
    level = np.rint(values / white * 255)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is 0
        level = 255 - level
    if (clear := image.info.get("transparency")) is not None:
        level[values == clear] = BACKGROUND[0]
    return Image.fromarray(level.astype(np.uint8))


def check_file(path: pathlib.Path, max_pixels: int) -> bool:
    """Returns whether an image file holds more than one image, of which we take the
    first.

    Reads the header and looks for the mark of the end, which a file cut short lacks.
    Decodes only where there is no mark.

    Raises:
        ValueError, OSError: see `open_image`.
        Exception: what Pillow has for damaged files, of many types.
    """
    with path.open("rb") as file, open_image(file, max_pixels) as image:
        end = _ENDS.get(image.format or "")
        if end is None or (end and not _ends_with(file, end)):
            to_rgb(image)
        return bool(getattr(image, "is_animated", False))


#: marks by format; empty for those that Pillow reads as a whole when it opens them
_ENDS = {
    "JPEG": b"\xff\xd9",
    "MPO": b"\xff\xd9",
    "JPEG2000": b"\xff\xd9",
    "PNG": b"IEND\xaeB`\x82",
    "GIF": b";",
    "WEBP": b"",
    "AVIF": b"",
}


def _ends_with(file: BinaryIO, end: bytes) -> bool:
    place = file.tell()  # which Pillow goes on from
    file.seek(-len(end), os.SEEK_END)
    found = file.read()
    file.seek(place)
    return found == end


def is_image(path: pathlib.Path) -> bool:
    """Whether a file starts as one of `FORMATS` does.

    Raises:
        PermissionError: nobody may look.
    """
    try:
        Image.open(path, formats=FORMATS).close()
    except PermissionError:
        raise
    except Exception:  # of Pillow, by format
        return False
    return True
