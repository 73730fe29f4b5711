"""Changes the size in pixels."""

from __future__ import annotations

from collections.abc import Mapping

from pyvips import Image

from services.media.domain import Fit, Resize, resized
from services.media.operations.image import Source


def run(source: Source, operation: Resize, _files: Mapping[str, Source]) -> Image:
    width, height = resized(source.width, source.height, operation)
    if operation.fit is Fit.FILL:
        return source.pixels(width, height, size="both", crop="centre")
    return source.pixels(width, height, size="force")  # the ratio is kept by `resized`, but for the rounding
