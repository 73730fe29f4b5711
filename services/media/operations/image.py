"""Images on disk: read with suspicion, written small. What all operations share.

Importing this module closes every loader of libvips but those named here, for the whole process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor
from pathlib import Path
from typing import Any, TypeVar

import pyvips
from pyvips import GValue, Image

from services.media import domain
from services.media.domain import Format, ImageTooLarge, InputUnsupported, OutputTooLarge, Written
from services.media.operations import jpeg, pdf, tiff

Progress = Callable[[float], None]
"""Takes the share that is done, 0..1."""
Place = Callable[[int, Format], Path]
"""Takes the index of a result, from 0, and its format; gives where it goes."""
T = TypeVar("T")

# libvips' name of a loader, as it sniffs the bytes, and the format.
_LOADERS: Mapping[str, Format | None] = {
    "VipsForeignLoadJpeg": Format.JPEG,
    "VipsForeignLoadPng": Format.PNG,
    "VipsForeignLoadWebp": Format.WEBP,
    "VipsForeignLoadHeif": Format.AVIF,
    "VipsForeignLoadNsgif": Format.GIF,
    "VipsForeignLoadTiff": None,
}
# What libvips' ICC code turns into sRGB faithfully. Scientific TIFFs (Lab, float, complex) come out wrong: refused.
_COLOURS = {"srgb", "rgb", "b-w", "rgb16", "grey16", "cmyk"}
_DEPTHS = {"uchar", "ushort"}
_INKS = {"b-w": 1, "grey16": 1, "cmyk": 4}  # channels of colours, where they are not red, green and blue

_UNBOUNDED_PX = 10_000_000  # libvips' VIPS_MAX_COORD: a box that shrinks nothing

_OPTIONS: Mapping[Format, dict[str, Any]] = {
    Format.JPEG: {"optimize_coding": True},
    # Against 6 without a filter: photographs 10 to 40 % smaller, no slower; drawings up to a fifth larger.
    Format.PNG: {"compression": 3, "filter": "up"},
    # Effort 2 takes 0.4 times as long, and 3 to 17 % more bytes for the same SSIM; 5 and 6, no fewer.
    Format.WEBP: {"effort": 4},
    # Effort 4, the default, takes three times as long for 3 % less.
    Format.AVIF: {"compression": "av1", "effort": 2},
    # Effort 7, the default, takes three times as long to choose colours of which nobody sees the difference.
    Format.GIF: {"effort": 4, "keep_duplicate_frames": True},
}
_PNG_LEVEL_9_PX = 4_000_000  # level 9, some percent smaller than 6, takes 10 s for a photograph of twelve megapixels
PALETTE = {"palette": True, "filter": "none"}  # a filter reckons with numbers that are colours, not names of colours
_WITHOUT_QUALITY = {Format.PNG, Format.GIF}

_SAME_COLOUR = 2  # of 255: less than two encodings of one JPEG differ by

pyvips.block_untrusted_set(True)
pyvips.operation_block_set("VipsForeignLoad", True)
for _name in _LOADERS:
    pyvips.operation_block_set(_name, False)
pyvips.cache_set_max(0)  # inputs of different tasks may stand under one path after another
pyvips.concurrency_set(1)  # the slots of a worker use the other cores; a second thread makes no image sooner


class Picture(ABC):
    """One image, or one frame of an animation: what an operation's function is given.

    `width` and `height` are those of the upright image, pixels.
    """

    width: int
    height: int

    def __init__(self) -> None:
        self._common: list[Any] = []

    @abstractmethod
    def pixels(self, width: int = _UNBOUNDED_PX, height: int = _UNBOUNDED_PX, *, size: str = "down") -> Image:
        """Return the image upright and in sRGB, 8 bits, made to fit a box; decodes no more than that needs.

        The pixels stream: they can be read once, from top to bottom.

        Args:
            width: of the box, pixels, > 0.
            height: of the box, pixels, > 0.
            size: libvips' VipsSize: `down` never enlarges, `both` may, `force` gives up the ratio.
        """

    def filling(self, width: int, height: int) -> Image:
        """Return the middle of the image, made to fill a box; streams as `pixels` does.

        Args:
            width: of the box, pixels, > 0.
            height: of the box, pixels, > 0.
        """
        picture: Picture = self
        if (scale := max(width / self.width, height / self.height)) > 1:
            # Cut first: of a thin strip that is enlarged, what nobody will see can be a thousand times the box.
            left = max(0, floor((self.width - width / scale) / 2))
            top = max(0, floor((self.height - height / scale) / 2))
            picture = Made(self.pixels().crop(left, top, self.width - 2 * left, self.height - 2 * top))
        across, down = domain.covering(picture.width, picture.height, width, height)
        scaled = picture.pixels(across, down, size="force")
        return scaled.crop((across - width) // 2, (down - height) // 2, width, height)

    def once(self, work: Callable[[], T]) -> T:
        """Return what `work` gave for an animation's first frame: for what all its frames must have in common."""
        if not self._common:
            self._common.append(work())
        return self._common[0]  # type: ignore[no-any-return]  # pyvips has no types

    def stream(self) -> tuple[bytes, int] | None:
        """Return the JPEG stream of the file, without metadata, and its bands, if that alone is this picture."""
        return None


class Made(Picture):
    """What an operation made, or a frame of an animation: upright, sRGB."""

    def __init__(self, image: Image) -> None:
        super().__init__()
        self.width, self.height = image.width, image.height
        self._image = image

    def pixels(self, width: int = _UNBOUNDED_PX, height: int = _UNBOUNDED_PX, *, size: str = "down") -> Image:
        if (width, height) in ((_UNBOUNDED_PX, _UNBOUNDED_PX), (self.width, self.height)):
            return self._image
        return self._image.thumbnail_image(width, height=height, size=size)


@dataclass(frozen=True, slots=True)
class Frames:
    """One picture, or those of an animation, with what libvips calls `delay` (milliseconds each) and `loop`."""

    pictures: Sequence[Picture]
    delay: Sequence[int] = ()
    loop: int = 0
    are_the_input: bool = True

    def each(self, work: Callable[[Picture], Image]) -> Frames:
        """Return what `work` makes of every frame.

        Raises:
            ImageTooLarge: what it is given, by the step before, is more than an input may be.
        """
        first = self.pictures[0]
        _require_budget(first.width, first.height, len(self.pictures))
        common: list[Any] = []
        for picture in self.pictures:
            picture._common = common  # noqa: SLF001 - Picture.once is of this step
        return Frames([Made(work(picture)) for picture in self.pictures], self.delay, self.loop, are_the_input=False)

    def pixels(self, format_: Format) -> Image:
        """Return what is to be written: the picture, or all frames one below the other where the format holds them.

        Raises:
            OutputTooLarge: a side is longer than the format or the bounds allow, or there are too many pixels in all.
        """
        images = [picture.pixels() for picture in (self.pictures if format_.holds_frames else self.pictures[:1])]
        first = images[0]
        _require_writable(first, len(images), format_)
        if len(images) == 1:
            return first
        if any(image.hasalpha() for image in images):
            images = [image if image.hasalpha() else image.addalpha() for image in images]
        roll = Image.arrayjoin(images, across=1).copy()
        roll.set_type(GValue.gint_type, "page-height", first.height)
        roll.set_type(GValue.array_int_type, "delay", list(self.delay))
        roll.set_type(GValue.gint_type, "loop", self.loop)
        return roll


class Source(Picture):
    """An image file whose header was read and found acceptable; no pixel is decoded yet.

    `own_format` is None where that cannot be written; then `format`, what a result has when nobody says, is PNG.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            InputUnsupported: not an image of a kind that is taken.
            InputDamaged: of such a kind, but its header makes no sense.
            ImageTooLarge: more pixels or frames than the bounds.
        """
        super().__init__()
        self.path = path
        loader = _sniffed(path)
        if loader is None:
            raise InputUnsupported("The file is not a JPEG, PNG, WebP, AVIF, GIF or TIFF image.")
        if loader == "VipsForeignLoadTiff" and tiff.is_raw(path):
            raise InputUnsupported(
                "The file is a camera's raw picture (as NEF, CR2, ARW and DNG are): develop it, and save it as JPEG."
            )
        self._is_animated_avif = _is_animated_avif(path)
        try:
            header = self._opened()
        except pyvips.Error as fault:
            raise damaged() from fault
        _require_acceptable(header)
        self.own_format = _LOADERS[loader]
        self.format = self.own_format or Format.PNG
        self._frame_count = _field(header, "n-pages", 1) if self.format.holds_frames else 1
        self._has_selection = (
            loader == "VipsForeignLoadTiff" and header.bands > _inks(header) and tiff.has_selection(path)
        )
        self._is_deep_cmyk = header.interpretation == "cmyk" and header.format == "ushort"
        # `thumbnail` itself brings CMYK to sRGB, with or without a profile.
        self._profiled = (
            bool(header.get_typeof("icc-profile-data"))
            and header.interpretation != "cmyk"
            and _changes_colours(bytes(header.get("icc-profile-data")), is_grey=header.bands < 3)
        )
        orientation = _field(header, "orientation", 1)  # EXIF 2.32, 4.6.5.1.6
        on_its_side = 5 <= orientation <= 8
        self._stored = header.width, header.height
        self.width, self.height = self._stored[::-1] if on_its_side else self._stored
        self._is_plain_jpeg = (
            loader == "VipsForeignLoadJpeg"
            and orientation == 1
            and not self._profiled
            and header.interpretation in ("srgb", "b-w")
        )

    def pixels(self, width: int = _UNBOUNDED_PX, height: int = _UNBOUNDED_PX, *, size: str = "down") -> Image:
        options = {"shrink": shrink} if (shrink := self._shrink(width, height)) > 1 else {}
        if options or self._has_selection or self._is_deep_cmyk or self._is_animated_avif:
            image = self._opened(fail_on="error", **options)
            image = image[: _inks(image)] if self._has_selection else image
            # libvips itself makes the inks 8 bits, and leaves the transparency as it is.
            image = (image >> 8).cast("uchar") if self._is_deep_cmyk else image
            image = image.thumbnail_image(width, height=height, size=size)
        else:
            image = Image.thumbnail(str(self.path), width, height=height, size=size, fail_on="error")
        return self._in_srgb(image)

    def _shrink(self, width: int, height: int) -> int:
        """Return by how much a JPEG's own decoder may shrink it on the way to a box.

        As much as is possible, as sharp does. `thumbnail` by itself leaves the last half to its own, finer, filter:
        twelve megapixels to 1024 pixels then take 77 ms of a core instead of 55.
        """
        if self.own_format is not Format.JPEG:
            return 1
        wanted = min(self.width // width, self.height // height)
        return next((factor for factor in (8, 4, 2) if factor <= wanted), 1)

    @property
    def is_animated(self) -> bool:
        return self._frame_count > 1

    def frames(self, *, animated: bool) -> Frames:
        """Return the image to work on; all its frames if it is an animation and they are wanted, decoded at once.

        Raises:
            ImageTooLarge: its frames together are more than the bounds.
            pyvips.Error: they cannot be decoded.
        """
        if not (animated and self.is_animated):
            return Frames([self])
        _require_budget(self.width, self.height, self._frame_count)
        roll = self._opened(n=-1, fail_on="error")
        roll = self._in_srgb(roll).copy_memory()
        roll.remove("page-height")  # no frame is a roll
        width, height = self._stored
        # What a decoder finds may be less than what its header promised.
        tops = range(0, roll.height - height + 1, height)
        return Frames(
            [Made(roll.crop(0, top, width, height).autorot()) for top in tops],
            _field(roll, "delay", [100] * len(tops))[: len(tops)],
            _field(roll, "loop", 0),
        )

    def stream(self) -> tuple[bytes, int] | None:
        if not self._is_plain_jpeg:
            return None
        bare = jpeg.bare(self.path.read_bytes())
        if bare is None or not _is_flawless(bare) or _is_flawless(bare[:-3] + jpeg.END):
            return None  # its last byte is no part of the picture: who knows what is before it
        return bare, Image.new_from_buffer(bare, "", access="sequential").bands

    def require_decodable(self) -> None:
        """Decode every pixel and keep none.

        Raises:
            InputDamaged: that cannot be done.
        """
        options = {"n": -1} if self.is_animated else {}
        try:
            self._opened(fail_on="error", **options).avg()
        except pyvips.Error as fault:
            raise damaged() from fault

    def _opened(self, **options: Any) -> Image:
        load = Image.heifload if self._is_animated_avif else Image.new_from_file
        return load(str(self.path), access="sequential", **options)

    def _in_srgb(self, image: Image) -> Image:
        if self._profiled:
            # Not left to `thumbnail`, which goes by way of floating-point Lab and takes ten times as long.
            image = image.icc_transform("srgb", embedded=True, input_profile="srgb")
        # No profile goes along that is no longer true. libvips 8.18 also leaves its own of CMYK there after it has
        # freed it, with a cache of nothing: a copy in memory of such an image ends the process.
        image = image.colourspace("srgb").copy()
        image.remove("icc-profile-data")
        return image


def _is_flawless(stream: bytes) -> bool:
    """Tell whether a decoder finds nothing odd in a JPEG, bytes between its scans included."""
    try:
        Image.new_from_buffer(stream, "", access="sequential", fail_on="warning").avg()
    except pyvips.Error:
        return False
    return True


def write(image: Image, format_: Format, quality: int, place: Path, progress: Progress) -> Written:
    """Compute an image and write it, with an sRGB profile and no other metadata.

    Args:
        image: as `Frames.pixels` returns it.
        format_: how to write it.
        quality: 1..100, where the format has one.
        place: the file.
        progress: is told how far it is, often.

    Raises:
        pyvips.Error: the pixels could not be computed; the input may be damaged.
    """
    image.set_progress(True)
    image.signal_connect("eval", lambda _image, state: progress(state.percent / 100))
    if format_ is Format.PDF:
        place.write_bytes(encoded(image, format_, {"Q": quality}))
    else:
        options = _OPTIONS[format_] if format_ in _WITHOUT_QUALITY else {**_OPTIONS[format_], "Q": quality}
        image.write_to_file(str(place), **options, keep="icc", profile="srgb")
    return written(image, format_, place)


def encoded(image: Image, format_: Format, options: Mapping[str, Any]) -> bytes:
    """Return an image as a file without any metadata: sRGB is what a reader takes it for.

    A PNG takes longer than by `write` and is smaller, which is what is asked here; nothing but grey is stored as grey.

    Args:
        image: in memory: it may be read several times.
        format_: how to write it.
        options: libvips', of the format.
    """
    if format_ is Format.PDF:
        stream = image.write_to_buffer(".jpg", **_OPTIONS[Format.JPEG], **options, keep="none")
        return pdf.page(stream, image.width, image.height, image.bands)
    common = _OPTIONS[format_]
    if format_ is Format.PNG:
        image = _as_grey(image)
        common = {"compression": 9 if image.width * image.height <= _PNG_LEVEL_9_PX else 6, "filter": "all"}
    return bytes(image.write_to_buffer(f".{format_.value}", **{**common, **options}, keep="none"))


def decoded(file: bytes, format_: Format) -> Image:
    """Return what `encoded` made, as it will be seen; the pixels stream."""
    options = {"n": -1} if format_.holds_frames else {}
    return Image.new_from_buffer(file, "", access="sequential", **options).colourspace("srgb")


def written(image: Image, format_: Format, place: Path) -> Written:
    """Return what the file at `place` is, into which `image` was written."""
    return Written(place, format_, image.width, _field(image, "page-height", image.height))


def flattened(image: Image, background: str) -> Image:
    """Return the image without transparency, `background` (`#rrggbb`) behind it."""
    return image.flatten(background=rgb(background)) if image.hasalpha() else image


def rgb(colour: str) -> list[int]:
    """Return red, green and blue, 0..255, of `#rrggbb`."""
    return list(bytes.fromhex(colour.removeprefix("#")))


def damaged() -> domain.InputDamaged:
    return domain.InputDamaged("The image is damaged or incomplete.")


def _as_grey(image: Image) -> Image:
    """Return an image of nothing but grey with one band for it, and its transparency; another one as it is."""
    if image.bands < 3 or (image[0] != image[1]).max() or (image[0] != image[2]).max():
        return image
    bands = image[0].bandjoin(image[3]) if image.hasalpha() else image[0]
    return bands.copy(interpretation="b-w")


def _sniffed(path: Path) -> str | None:
    name = pyvips.vips_lib.vips_foreign_find_load(str(path).encode())
    if name == pyvips.ffi.NULL:
        pyvips.vips_lib.vips_error_clear()
        return "VipsForeignLoadHeif" if _is_animated_avif(path) else None
    return str(pyvips.ffi.string(name).decode()).removesuffix("File")


def _is_animated_avif(path: Path) -> bool:
    """Tell whether a file is what libvips can read, and does not know by its signature."""
    with path.open("rb") as file:
        return file.read(12)[4:] == b"ftypavis"


def _require_acceptable(header: Image) -> None:
    _require_budget(header.width, header.height, 1)
    if (frames := _field(header, "n-pages", 1)) > domain.MAX_FRAMES:
        raise ImageTooLarge(
            f"The image has {frames} frames; {domain.MAX_FRAMES} are the most.",
            metadata={"frames": str(frames), "max_frames": str(domain.MAX_FRAMES)},
        )
    if header.interpretation not in _COLOURS or header.format not in _DEPTHS:
        raise InputUnsupported(
            "The image's colours are stored in a way that is not supported: use 8 or 16 bits of grey, RGB or CMYK.",
        )
    if header.bands > _inks(header) + 1:  # libvips takes the last one for the transparency
        raise InputUnsupported(
            "The image has channels besides its colours and transparency: save it without spot colours and selections.",
        )
    if _field(header, "heif-compression", "av1") != "av1":
        raise InputUnsupported("HEIC images are not supported: save the picture as JPEG or AVIF.")


def _inks(image: Image) -> int:
    return _INKS.get(image.interpretation, 3)


def _require_budget(width: int, height: int, frames: int) -> None:
    if width * height * frames > domain.MAX_PIXELS:
        times = "" if frames == 1 else f" × {frames} frames"
        raise ImageTooLarge(
            f"The image has {width} × {height}{times} pixels; {domain.MAX_PIXELS} in all are the most.",
            metadata={
                "width": str(width), "height": str(height), "frames": str(frames), "max_pixels": str(domain.MAX_PIXELS)
            },
        )  # fmt: skip


def _require_writable(image: Image, frames: int, format_: Format) -> None:
    most = format_.max_side_px
    metadata = {"width": str(image.width), "height": str(image.height), "format": format_.name}
    if max(image.width, image.height) > most:
        raise OutputTooLarge(
            f"The result would be {image.width} × {image.height} pixels; {format_.name} takes {most} a side at most.",
            metadata={**metadata, "max": str(most)},
        )
    if frames > 1 and image.width * image.height * frames > domain.MAX_PIXELS:
        raise OutputTooLarge(
            f"The result would be {image.width} × {image.height} × {frames} frames pixels; {domain.MAX_PIXELS} in all "
            "are the most.",
            metadata={**metadata, "frames": str(frames), "max_pixels": str(domain.MAX_PIXELS)},
        )


@lru_cache(maxsize=64)  # cameras are fewer than photographs
def _changes_colours(profile: bytes, *, is_grey: bool) -> bool:
    """Tell whether a profile is of use: most cameras' is sRGB, and that of a damaged file may make no sense."""
    # 16 x 16 x 16 colours, in a square of 64 pixels a side.
    number = Image.xyz(64, 64)[1] * 64 + Image.xyz(64, 64)[0]
    bands = [number % 16, (number / 16).floor() % 16, (number / 256).floor()]
    colours = (bands[0] if is_grey else bands[0].bandjoin(bands[1:])) * 17
    colours = colours.cast("uchar").copy(interpretation="b-w" if is_grey else "srgb").copy_memory()
    colours.set_type(GValue.blob_type, "icc-profile-data", profile)
    try:
        return bool((colours.icc_transform("srgb", embedded=True) - colours).abs().max() > _SAME_COLOUR)
    except pyvips.Error:
        return False


def _field(header: Image, name: str, default: Any) -> Any:
    return header.get(name) if header.get_typeof(name) else default
