"""Detections drawn on their image: a tint for each mask, a box, a name and a score."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.data.annotations import decode
from train.data.text import printable

#: of a mask's colour, over the image
_TINT = 0.45
#: of the shorter side, the height of letters and the width of lines
_LETTERS, _LINE = 1 / 32, 1 / 200
_LEAST_LETTERS = 10
#: of a circle, from the colour of a class to that of the next: no two are alike soon
_GOLDEN = 0.618034


def draw(
    pixels: np.ndarray,
    annotations: Iterable[Mapping[str, Any]],
    names: Mapping[int, str],
) -> Image.Image:
    """Returns an image with what was found on it.

    Args:
        pixels: ``[H, W, 3]`` uint8.
        annotations: in COCO's form, see `train.engine.average_precision.results`; the
            last lie on top, and so the most certain should. Without a score they are
            the truth.
        names: of the categories, by id.
    """
    height, width = pixels.shape[:2]
    annotations = list(annotations)
    tinted = np.array(pixels, np.float32)
    for each in annotations:
        mask = decode(each["segmentation"], height, width).astype(bool)
        tint = np.array(colour(each["category_id"]))
        tinted[mask] = (1 - _TINT) * tinted[mask] + _TINT * tint
    image = Image.fromarray(np.rint(tinted).astype(np.uint8))
    side = min(height, width)
    font = ImageFont.load_default(max(_LEAST_LETTERS, side * _LETTERS))
    line = max(1, round(side * _LINE))
    canvas = ImageDraw.Draw(image)
    for each in annotations:
        x, y, w, h = each["bbox"]
        tint = colour(each["category_id"])
        canvas.rectangle((x, y, max(x, x + w - 1), max(y, y + h - 1)), None, tint, line)
        text = printable(names[each["category_id"]])
        if "score" in each:
            text += f" {each['score']:.2f}"
        _label(canvas, text, (x, y), (width, height), font, tint)
    return image


def _label(
    canvas: ImageDraw.ImageDraw,
    text: str,
    corner: tuple[float, float],
    size: tuple[int, int],
    font: Any,
    tint: tuple[int, int, int],
) -> None:
    """Writes above a corner, or below where there is no room, within the image."""
    left, top, right, bottom = canvas.textbbox((0, 0), text, font)
    wide, high = right - left + 2, bottom - top + 2
    x = max(0, min(corner[0], size[0] - wide))
    y = corner[1] - high if corner[1] >= high else corner[1]
    canvas.rectangle((x, y, x + wide, y + high), tint)
    canvas.text((x + 1 - left, y + 1 - top), text, "black", font)


def colour(category_id: int) -> tuple[int, int, int]:
    """Returns a bright colour of its own for each category."""
    rgb = colorsys.hsv_to_rgb(category_id * _GOLDEN % 1, 0.65, 1.0)
    red, green, blue = (round(255 * channel) for channel in rgb)
    return red, green, blue
