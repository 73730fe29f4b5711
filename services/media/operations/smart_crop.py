"""Cuts to a size, keeping what people look at."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from pyvips import Image

from services.media.domain import Interest, SmartCrop, covering, placed_around
from services.media.operations import faces
from services.media.operations.image import Made, Picture, Source


def run(picture: Picture, operation: SmartCrop, _files: Mapping[str, Source]) -> Image:
    width, height = operation.width, operation.height
    if (scale := max(width / picture.width, height / picture.height)) > 1:  # what will be cut off is not enlarged
        width, height = min(picture.width, ceil(width / scale)), min(picture.height, ceil(height / scale))
        pixels = picture.pixels()
    else:
        pixels = picture.pixels(*covering(picture.width, picture.height, width, height), size="force")
    pixels = pixels.copy_memory()  # looked at first, cut then
    left, top = picture.once(lambda: _corner(pixels, width, height, operation.interest))
    return Made(pixels.crop(left, top, width, height)).filling(operation.width, operation.height)


def _corner(image: Image, width: int, height: int, interest: Interest) -> tuple[int, int]:
    if interest is Interest.FACES:
        if found := faces.found(image):
            return placed_around(found, image.width, image.height, width, height)
        interest = Interest.ATTENTION
    cut = image.smartcrop(width, height, interesting=interest.value)
    return -cut.xoffset, -cut.yoffset  # libvips notes what it cut off
