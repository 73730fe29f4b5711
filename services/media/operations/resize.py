"""Changes the size in pixels."""

from __future__ import annotations

from collections.abc import Mapping

from pyvips import Image

from services.media.domain import Fit, Resize, resized
from services.media.operations.image import Picture, Source


def run(picture: Picture, operation: Resize, _files: Mapping[str, Source]) -> Image:
    width, height = resized(picture.width, picture.height, operation)
    if operation.fit is Fit.FILL:
        return picture.filling(width, height)
    return picture.pixels(width, height, size="force")  # the ratio is kept by `resized`, but for the rounding
