"""Cuts to a size, keeping what people look at."""

from __future__ import annotations

from collections.abc import Mapping

from pyvips import Image

from services.media.domain import Interest, SmartCrop, covering, placed_around
from services.media.operations import faces
from services.media.operations.image import Picture, Source


def run(picture: Picture, operation: SmartCrop, _files: Mapping[str, Source]) -> Image:
    width, height = covering(picture.width, picture.height, operation.width, operation.height)
    scaled = picture.pixels(width, height, size="force").copy_memory()  # looked at first, cut then
    left, top = picture.once(lambda: _corner(scaled, operation))
    return scaled.crop(left, top, operation.width, operation.height)


def _corner(image: Image, operation: SmartCrop) -> tuple[int, int]:
    interest = operation.interest
    if interest is Interest.FACES:
        if found := faces.found(image):
            return placed_around(found, image.width, image.height, operation.width, operation.height)
        interest = Interest.ATTENTION
    cut = image.smartcrop(operation.width, operation.height, interesting=interest.value)
    return -cut.xoffset, -cut.yoffset  # libvips notes what it cut off
