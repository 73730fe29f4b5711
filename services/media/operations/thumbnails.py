"""Makes several sizes from one decoding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pyvips import Image

from services.media.domain import Convert, Fit, Format, Resize, Thumbnails, Written, resized
from services.media.operations import convert
from services.media.operations.image import Frames, Picture, Place, Progress, Source


def formats(operation: Thumbnails, source: Source) -> Sequence[Format]:
    return [size.format or source.format for size in operation.sizes]


def write(frames: Frames, operation: Thumbnails, source: Source, place: Place, progress: Progress) -> Sequence[Written]:
    first = frames.pictures[0]
    largest = frames.each(lambda picture: _shrunk(picture, operation.sizes))
    results: list[Written] = []
    for index, (size, format_) in enumerate(zip(operation.sizes, formats(operation, source), strict=True)):
        box = resized(first.width, first.height, size)
        made = largest.each(partial(_sized, box=box, fill=size.fit is Fit.FILL))
        end = Convert(format=format_, quality=size.quality)
        results += convert.write(made, end, source, partial(_instead, place, index), lambda _share: None)
        progress((index + 1) / len(operation.sizes))
    return results


def _instead(place: Place, index: int, _: int, format_: Format) -> Path:
    return place(index, format_)


def _shrunk(picture: Picture, sizes: Sequence[Resize]) -> Image:
    """Return the picture in memory, as small as the largest of the sizes allows."""
    scale = 0.0
    for size in sizes:
        width, height = resized(picture.width, picture.height, size)
        scale = max(scale, width / picture.width, height / picture.height)
    if scale >= 1:
        return picture.pixels().copy_memory()
    width, height = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.pixels(width, height, size="force").copy_memory()


def _sized(picture: Picture, box: tuple[int, int], *, fill: bool) -> Image:
    if fill:
        return picture.filling(*box)
    return picture.pixels(*box, size="force")
