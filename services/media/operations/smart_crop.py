"""Cuts to a size, keeping what people look at."""

from __future__ import annotations

from collections.abc import Mapping

from pyvips import Image

from services.media.domain import SmartCrop
from services.media.operations.image import Source


def run(source: Source, operation: SmartCrop, _files: Mapping[str, Source]) -> Image:
    return source.pixels(operation.width, operation.height, size="both", crop=operation.interest.value)
