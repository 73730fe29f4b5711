"""Images on disk: read with suspicion, written small. What all operations share.

Importing this module closes every loader of libvips but those named here, for the whole process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyvips
from pyvips import Image

from services.media import domain
from services.media.domain import Format, ImageTooLarge, InputUnsupported, OutputTooLarge, Written

Progress = Callable[[float], None]
"""Takes the share that is done, 0..1."""

# libvips' name of a loader, as it sniffs the bytes, and what the result is written in when nobody says.
_LOADERS = {
    "VipsForeignLoadJpeg": Format.JPEG,
    "VipsForeignLoadPng": Format.PNG,
    "VipsForeignLoadWebp": Format.WEBP,
    "VipsForeignLoadHeif": Format.AVIF,
    "VipsForeignLoadNsgif": Format.PNG,
    "VipsForeignLoadTiff": Format.PNG,
}
# What libvips' ICC code turns into sRGB faithfully. Scientific TIFFs (Lab, float, complex) come out wrong: refused.
_COLOURS = {"srgb", "rgb", "b-w", "rgb16", "grey16", "cmyk"}
_DEPTHS = {"uchar", "ushort"}

_UNBOUNDED_PX = 10_000_000  # libvips' VIPS_MAX_COORD: a box that shrinks nothing

_SAVE: dict[Format, dict[str, Any]] = {
    Format.JPEG: {"optimize_coding": True},
    Format.PNG: {"compression": 6},
    Format.WEBP: {"effort": 4},
    # Effort 4, the default, takes three times as long for 3 % less.
    Format.AVIF: {"compression": "av1", "effort": 2},
}

pyvips.block_untrusted_set(True)
pyvips.operation_block_set("VipsForeignLoad", True)
for _name in _LOADERS:
    pyvips.operation_block_set(_name, False)
pyvips.cache_set_max(0)  # inputs of different tasks may stand under one path after another
pyvips.concurrency_set(2)  # the slots of a worker use the other cores


class Source:
    """An image file whose header was read and found acceptable; no pixel is decoded yet.

    `width` and `height` are those of the upright image, pixels. `format` is its own, as far as that can be written.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            InputUnsupported: not an image of a kind that is taken.
            InputDamaged: of such a kind, but its header makes no sense.
            ImageTooLarge: more pixels or frames than the bounds.
        """
        self._path = str(path)
        loader = _sniffed(self._path)
        if loader is None:
            raise InputUnsupported("The file is not a JPEG, PNG, WebP, AVIF, GIF or TIFF image.")
        try:
            header = pyvips.Image.new_from_file(self._path, access="sequential")
        except pyvips.Error as fault:
            raise damaged() from fault
        _require_acceptable(header)
        self.format = _LOADERS[loader]
        # `thumbnail` itself brings CMYK to sRGB, with or without a profile.
        self._profiled = bool(header.get_typeof("icc-profile-data")) and header.interpretation != "cmyk"
        on_its_side = 5 <= _field(header, "orientation", 1) <= 8  # EXIF 2.32, 4.6.5.1.6
        self.width, self.height = (
            (header.height, header.width) if on_its_side else (header.width, header.height)
        )  # fmt: skip

    def pixels(
        self, width: int = _UNBOUNDED_PX, height: int = _UNBOUNDED_PX, *, size: str = "down", crop: str = "none"
    ) -> Image:
        """Return the image upright and in sRGB, 8 bits, made to fit a box; decodes no more than that needs.

        The pixels stream: they can be read once, from top to bottom.

        Args:
            width: of the box, pixels, > 0.
            height: of the box, pixels, > 0.
            size: libvips' VipsSize: `down` never enlarges, `both` may, `force` gives up the ratio.
            crop: libvips' VipsInteresting: what is kept where the box is filled; `none` fills nothing.
        """
        image = pyvips.Image.thumbnail(self._path, width, height=height, size=size, crop=crop, fail_on="error")
        if self._profiled:
            # Not left to `thumbnail`, which goes by way of floating-point Lab and takes ten times as long.
            image = image.icc_transform("srgb", embedded=True, input_profile="srgb")
        return image.colourspace("srgb")


def write(image: Image, format_: Format, quality: int, output: Path, progress: Progress) -> Written:
    """Compute an image and write it, with an sRGB profile and no other metadata.

    Raises:
        OutputTooLarge: a side is longer than the format or the bounds allow.
        pyvips.Error: the pixels could not be computed; the input may be damaged.
    """
    most = domain.MAX_WEBP_SIDE_PX if format_ is Format.WEBP else domain.MAX_SIDE_PX
    if max(image.width, image.height) > most:
        raise OutputTooLarge(
            f"The result would be {image.width} × {image.height} pixels; {format_.name} takes {most} a side at most.",
            metadata={"width": str(image.width), "height": str(image.height), "max": str(most), "format": format_.name},
        )
    if format_ is Format.JPEG:
        image = flattened(image, domain.WHITE)
    image.set_progress(True)
    image.signal_connect("eval", lambda _image, state: progress(state.percent / 100))
    options = _SAVE[format_] if format_ is Format.PNG else {**_SAVE[format_], "Q": quality}
    image.write_to_file(str(output), **options, keep="icc", profile="srgb")
    return Written(output, format_, image.width, image.height)


def flattened(image: Image, background: str) -> Image:
    """Return the image without transparency, `background` (`#rrggbb`) behind it."""
    return image.flatten(background=rgb(background)) if image.hasalpha() else image


def rgb(colour: str) -> list[int]:
    """Return red, green and blue, 0..255, of `#rrggbb`."""
    return list(bytes.fromhex(colour.removeprefix("#")))


def damaged() -> domain.InputDamaged:
    return domain.InputDamaged("The image is damaged or incomplete.")


def require_decodable(path: Path) -> None:
    """Decode every pixel of an image and keep none.

    Raises:
        InputDamaged: that cannot be done.
    """
    try:
        pyvips.Image.new_from_file(str(path), access="sequential", fail_on="error").avg()
    except pyvips.Error as fault:
        raise damaged() from fault


def _sniffed(path: str) -> str | None:
    name = pyvips.vips_lib.vips_foreign_find_load(path.encode())
    if name == pyvips.ffi.NULL:
        pyvips.vips_lib.vips_error_clear()
        return None
    return str(pyvips.ffi.string(name).decode()).removesuffix("File")


def _require_acceptable(header: Image) -> None:
    if header.width * header.height > domain.MAX_PIXELS:
        raise ImageTooLarge(
            f"The image has {header.width} × {header.height} pixels; {domain.MAX_PIXELS} in all are the most.",
            metadata={"width": str(header.width), "height": str(header.height), "max_pixels": str(domain.MAX_PIXELS)},
        )
    if (frames := _field(header, "n-pages", 1)) > domain.MAX_FRAMES:
        raise ImageTooLarge(
            f"The image has {frames} frames; {domain.MAX_FRAMES} are the most.",
            metadata={"frames": str(frames), "max_frames": str(domain.MAX_FRAMES)},
        )
    if header.interpretation not in _COLOURS or header.format not in _DEPTHS:
        raise InputUnsupported(
            "The image's colours are stored in a way that is not supported: use 8 or 16 bits of grey, RGB or CMYK.",
        )
    if _field(header, "heif-compression", "av1") != "av1":
        raise InputUnsupported("HEIC images are not supported: save the picture as JPEG or AVIF.")


def _field(header: Image, name: str, default: Any) -> Any:
    return header.get(name) if header.get_typeof(name) else default
