"""Makes a file of at most so many bytes: in the best quality that fits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from services.media import domain
from services.media.domain import Compress, Format, TargetUnreachable, Written
from services.media.operations import image
from services.media.operations.image import Frames, Place, Progress, Source


def formats(operation: Compress, source: Source) -> Sequence[Format]:
    return [operation.format or source.format]


def write(frames: Frames, operation: Compress, source: Source, place: Place, progress: Progress) -> Sequence[Written]:
    (format_,) = formats(operation, source)
    pixels = frames.pixels(format_)
    if format_.is_opaque:
        pixels = image.flattened(pixels, domain.WHITE)
    pixels = pixels.copy_memory()  # decoded once for all encodings
    steps = ladder(format_, operation.min_quality)
    is_in_order = format_ not in (Format.PNG, Format.GIF)  # fewer colours may take more bytes: they are dithered
    most = len(steps).bit_length() if is_in_order else len(steps)  # encodings
    files: dict[int, bytes] = {}

    def fits(step: int) -> bool:
        files[step] = image.encoded(pixels, format_, steps[step])
        progress(len(files) / most)
        return len(files[step]) <= operation.max_bytes

    if is_in_order:
        found = bisect_left(range(len(steps)), True, key=fits)
    else:
        found = next(filter(fits, range(len(steps))), len(steps))
    if found == len(steps):
        smallest = min(map(len, files.values()))
        raise TargetUnreachable(
            f"The image takes {smallest} bytes at least as {format_.name}; {operation.max_bytes} were asked for.",
            metadata={
                "smallest_bytes": str(smallest), "max_bytes": str(operation.max_bytes), "format": format_.name
            },
        )  # fmt: skip
    place(0, format_).write_bytes(files[found])
    return [image.written(pixels, format_, place(0, format_))]


def ladder(format_: Format, min_quality: int) -> Sequence[Mapping[str, Any]]:
    """Return a format's options for libvips, from the best to the smallest file."""
    if format_ is Format.PNG:
        return [{}, *({**image.PALETTE, "bitdepth": bits} for bits in (8, 4, 2, 1))]
    if format_ is Format.GIF:
        return [{"bitdepth": bits} for bits in (8, 6, 5, 4, 3, 2, 1)]
    return [{"Q": quality} for quality in range(100, min_quality - 1, -1)]
