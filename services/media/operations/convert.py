"""Changes the file format."""

from __future__ import annotations

from collections.abc import Mapping

from pyvips import Image

from services.media.domain import Convert, Format
from services.media.operations.image import Source, flattened


def run(source: Source, operation: Convert, _files: Mapping[str, Source]) -> Image:
    image = source.pixels()
    return flattened(image, operation.background) if operation.format is Format.JPEG else image
