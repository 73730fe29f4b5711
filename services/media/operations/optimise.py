"""Makes the smallest file that looks the same."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from pyvips import Image

from services.media import domain
from services.media.domain import AlreadySmallest, Format, Optimise, TargetUnreachable, Written
from services.media.operations import image, pdf
from services.media.operations.image import Frames, Place, Progress, Source
from services.media.operations.ssim import ssim

STILL = (Format.JPEG, Format.WEBP, Format.AVIF, Format.PNG)
ANIMATED = (Format.WEBP, Format.GIF)
# A format's options for libvips from the smallest file to the best: a bisection takes four encodings or five.
_QUALITIES: Sequence[Mapping[str, Any]] = [{"Q": quality} for quality in range(38, 96, 4)]
LADDERS: Mapping[Format, Sequence[Mapping[str, Any]]] = {
    Format.JPEG: [*_QUALITIES, {"Q": 100}],
    Format.WEBP: [*_QUALITIES, {"lossless": True}],
    Format.AVIF: [*_QUALITIES, {"lossless": True}],
    Format.PNG: [image.PALETTE, {}],
    Format.GIF: [{"bitdepth": bits} for bits in range(4, 9)],
}
TILE_PX, TILES_A_SIDE = 256, 4  # of the sample: a megapixel


def formats(operation: Optimise, source: Source) -> Sequence[Format]:
    if operation.format:
        return [operation.format]
    return ANIMATED if source.is_animated else STILL


def write(frames: Frames, operation: Optimise, source: Source, place: Place, progress: Progress) -> Sequence[Written]:
    # The picture in a PDF is a JPEG.
    tried = [Format.JPEG] if operation.format is Format.PDF else list(formats(operation, source))
    longest = max(frames.pictures[0].width, frames.pictures[0].height)
    tried = [each for each in tried if longest <= each.max_side_px] or tried  # if none: `pixels` says so
    pixels = frames.pixels(tried[0])
    if operation.format and operation.format.is_opaque:
        pixels = image.flattened(pixels, domain.WHITE)
    pixels = pixels.copy_memory()  # decoded once for all encodings
    tried = [format_ for format_ in tried if not (format_.is_opaque and pixels.hasalpha())]
    limit = source.path.stat().st_size
    too_large = False
    for format_, steps in _promising(pixels, tried, operation.min_ssim, progress):
        file = _first_alike(pixels, format_, steps, operation.min_ssim)
        if operation.format is Format.PDF and file:
            file = pdf.page(file, pixels.width, pixels.height, pixels.bands)
        elif file and len(file) > limit and frames.are_the_input and operation.format in (None, source.own_format):
            too_large = True
            break  # by the sample, the next formats are larger still
        if file:
            return [_written(pixels, operation.format or format_, file, place)]
    if operation.format in (None, Format.JPEG) and (found := frames.pictures[0].stream()):
        return [_written(pixels, Format.JPEG, found[0], place)]  # less its metadata, with every pixel as it was
    names = ", ".join(each.name for each in tried)
    if too_large:
        raise AlreadySmallest(
            f"The image cannot be smaller than its {limit} bytes as {names}.",
            metadata={"size_bytes": str(limit), "format": names},
        )
    raise TargetUnreachable(
        f"The image cannot be alike by {operation.min_ssim} as {names}.",
        metadata={"min_ssim": str(operation.min_ssim), "format": names},
    )


def _written(pixels: Image, format_: Format, file: bytes, place: Place) -> Written:
    place(0, format_).write_bytes(file)
    return image.written(pixels, format_, place(0, format_))


def _promising(
    pixels: Image, tried: Sequence[Format], min_ssim: float, progress: Progress
) -> list[tuple[Format, Sequence[Mapping[str, Any]]]]:
    """Return the formats in which the image can be alike enough, the smallest first, with the options to try.

    It is judged by a sample: encoding twelve megapixels in every format and quality would take a minute.
    """
    sample = _sample(pixels)
    found: list[tuple[int, Format, int]] = []
    for done, format_ in enumerate(tried, 1):
        sizes: dict[int, int] = {}  # of those that are alike

        def alike(step: int, format_: Format = format_, sizes: dict[int, int] = sizes) -> bool:
            file = image.encoded(sample, format_, LADDERS[format_][step])
            if ssim(sample, _shown(file, format_, sample)) < min_ssim:
                return False
            sizes[step] = len(file)
            return True

        bisect_left(range(len(LADDERS[format_])), True, key=alike)
        if format_ is Format.WEBP:
            alike(len(LADDERS[format_]) - 1)
        if sizes:
            step = min(sizes, key=sizes.__getitem__)  # of a drawing or a gradient the file without loss may be smallest
            found.append((sizes[step], format_, step))
        progress(done / (len(tried) + 1))
    return [(format_, LADDERS[format_][step:]) for _, format_, step in sorted(found, key=lambda each: each[0])]


def _first_alike(pixels: Image, format_: Format, steps: Sequence[Mapping[str, Any]], min_ssim: float) -> bytes | None:
    """Return the file of the first options that are enough for the whole image: nearly always the very first."""
    for options in steps:
        file = image.encoded(pixels, format_, options)
        if ssim(pixels, _shown(file, format_, pixels)) >= min_ssim:
            return file
    return None


def _shown(file: bytes, format_: Format, pixels: Image) -> Image:
    """Return what a file of `pixels` shows, an animation at each of its frames' times: libwebp joins what is alike."""
    found = image.decoded(file, format_)
    if found.height == pixels.height:
        return found
    found, height = found.copy_memory(), pixels.get("page-height")
    delays = pixels.get("delay")[: pixels.height // height - 1]
    # As browsers do, libvips takes 10 ms or less for not meant.
    starts = accumulate((delay if delay > 10 else 100 for delay in delays), initial=0)
    ends = list(accumulate(found.get("delay")))[:-1] if found.get_typeof("delay") else []
    tops = [height * bisect_right(ends, start) for start in starts]
    return Image.arrayjoin([found.crop(0, top, found.width, height) for top in tops], across=1)


def _sample(pixels: Image) -> Image:
    """Return tiles from all over a large image, or some frames of a large animation; a small one as it is."""
    if pixels.width * pixels.height <= (TILE_PX * TILES_A_SIDE) ** 2:
        return pixels
    if pixels.get_typeof("page-height"):
        height = pixels.get("page-height")
        count = max(2, (TILE_PX * TILES_A_SIDE) ** 2 // (pixels.width * height))
        tops = range(0, pixels.height, height * -(-pixels.height // height // count))
        tiles = [pixels.crop(0, top, pixels.width, height) for top in tops]
        return Image.arrayjoin(tiles, across=1).copy_memory()
    width, height = min(TILE_PX, pixels.width // TILES_A_SIDE), min(TILE_PX, pixels.height // TILES_A_SIDE)
    if not (width and height):  # a line
        return pixels
    places = [
        (x * pixels.width // TILES_A_SIDE, y * pixels.height // TILES_A_SIDE)
        for y in range(TILES_A_SIDE)
        for x in range(TILES_A_SIDE)
    ]
    return Image.arrayjoin([pixels.crop(x, y, width, height) for x, y in places], across=TILES_A_SIDE).copy_memory()
