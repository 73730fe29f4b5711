"""Writes a file in a format and quality: what ends every operation that does not say otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from services.media.domain import Convert, Format, Written
from services.media.operations import image, pdf
from services.media.operations.image import Frames, Place, Progress, Source


def formats(operation: Convert, source: Source) -> Sequence[Format]:
    return [operation.format or source.format]


def write(frames: Frames, operation: Convert, source: Source, place: Place, progress: Progress) -> Sequence[Written]:
    (format_,) = formats(operation, source)
    pixels = frames.pixels(format_)
    if format_ is Format.PDF and (found := frames.pictures[0].stream()):
        stream, bands = found
        place(0, format_).write_bytes(pdf.page(stream, pixels.width, pixels.height, bands))
        return [image.written(pixels, format_, place(0, format_))]
    if format_.is_opaque:
        pixels = image.flattened(pixels, operation.background)
    return [image.write(pixels, format_, operation.quality, place(0, format_), progress)]
