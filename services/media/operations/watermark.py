"""Puts a text or an image on top."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from math import isqrt
from unicodedata import category

import pyvips

from services.media.domain import Image, Text, TextEmpty, Watermark, placed
from services.media.operations.image import Picture, Source, rgb

# Noto has most scripts, Droid Sans Fallback Chinese, Japanese and Korean; `scripts/up` installs both.
FONTS = "Noto Sans, Droid Sans Fallback, DejaVu Sans, sans"
MIN_LETTER_PX = 12
# Control characters, line ends other than \n, halves of letters, what is no letter yet. Not Cf and Zs: joiners and
# spaces are part of a word's spelling, and marks of direction of its order.
NO_TEXT = ("Cc", "Zl", "Zp", "Cs", "Cn")


def run(picture: Picture, operation: Watermark, files: Mapping[str, Source]) -> pyvips.Image:
    base = picture.pixels()
    mark = picture.once(lambda: _mark(base, operation, files))
    if operation.tiled:
        x, y = 0, 0
    else:
        x, y = placed(base.width - mark.width, base.height - mark.height, operation.margin_px, operation.gravity)
    marked = base.composite2(mark, "over", x=x, y=y, compositing_space="srgb")
    return (marked if base.hasalpha() else marked[:3]).cast("uchar")


def _mark(base: pyvips.Image, operation: Watermark, files: Mapping[str, Source]) -> pyvips.Image:
    """Return what is laid upon an image, with its transparency."""
    room = (max(1, base.width - 2 * operation.margin_px), max(1, base.height - 2 * operation.margin_px))
    if operation.text is not None:
        mark = _text(operation.text, base.height, *room)
    elif operation.image is not None:
        mark = _image(operation.image, files, base.width, *room)
    else:
        raise TextEmpty("A watermark needs a text or an image.")
    opacity = mark[3] * operation.opacity
    mark = mark[:3].bandjoin(opacity.cast("uchar")).copy_memory()  # small; the base streams past it
    return _tiled(mark, base.width, base.height, operation.margin_px) if operation.tiled else mark


def _tiled(mark: pyvips.Image, width: int, height: int, margin_px: int) -> pyvips.Image:
    across, down = min(width, mark.width + margin_px), min(height, mark.height + margin_px)
    tile = mark.embed((across - mark.width) // 2, (down - mark.height) // 2, across, down).copy_memory()
    return tile.replicate(-(-width // across), -(-height // down)).crop(0, 0, width, height)


def _text(text: Text, image_height: int, room_width: int, room_height: int) -> pyvips.Image:
    content = text.content.replace("\t", " ")
    content = "".join(letter for letter in content if letter == "\n" or category(letter) not in NO_TEXT).strip()
    if not content:
        raise TextEmpty("The watermark's text has nothing to show.")
    wanted_px = text.size_px or max(MIN_LETTER_PX, image_height // 20)
    # A letter takes about a square: what cannot fit into the room is not laid out larger only to be shrunk again.
    letter_px = max(1, min(wanted_px, isqrt(room_width * room_height // len(content))))
    families = f"{text.font}, {FONTS}" if text.font else FONTS
    # At 72 dpi a point is a pixel. Pango takes markup: a text must not become some.
    try:
        mask = pyvips.Image.text(
            escape(content, quote=False), font=f"{families} {letter_px}", dpi=72, width=room_width, wrap="word-char"
        )
    except pyvips.Error as fault:
        if "no text to render" in str(fault):  # letters that all are blank, which only their font knows
            raise TextEmpty("The watermark's text has nothing to show.") from fault
        raise
    mask = _inside(mask, room_width, room_height)
    return mask.new_from_image(rgb(text.colour)).copy(interpretation="srgb").bandjoin(mask)


def _image(
    image: Image, files: Mapping[str, Source], base_width: int, room_width: int, room_height: int
) -> pyvips.Image:
    width = min(max(1, round(base_width * image.scale)), room_width)
    mark = files[image.file_id].pixels(width, room_height, size="both")
    return mark if mark.hasalpha() else mark.addalpha()


def _inside(image: pyvips.Image, width: int, height: int) -> pyvips.Image:
    if image.width <= width and image.height <= height:
        return image
    return image.thumbnail_image(width, height=height, size="down")
