"""Files that people's enemies send, and odd ones that cameras and programs make: what must become of each."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageCms

from tests.photographs import photograph

SECRET = b"<script>alert('atelier')</script>"  # no result holds it
SIZE = (60, 40)


@dataclass(frozen=True, slots=True)
class Hostile:
    """A file; `refusals` are the reasons that it may be refused with, none where it must be done right."""

    name: str
    content: bytes
    refusals: frozenset[str]


def corpus() -> Iterator[Hostile]:
    """Yield them all; none is large."""
    kinds = {
        "": [*_fine()],
        "INPUT_UNSUPPORTED": [*_no_images()],
        "IMAGE_TOO_LARGE INPUT_DAMAGED": [*_enormous()],
        "INPUT_DAMAGED INPUT_UNSUPPORTED": [*_cut_off()],
    }
    for reasons, files in kinds.items():
        for name, content in files:
            yield Hostile(name, content, frozenset(reasons.split()))


def seeds() -> dict[str, bytes]:
    """Return a real image of every format that is read, and of their variants, by name."""
    return {
        "jpeg": saved("JPEG", quality=85),
        "jpeg progressive": saved("JPEG", quality=85, progressive=True),
        "jpeg grey": saved("JPEG", picture().convert("L")),
        "jpeg cmyk": saved("JPEG", picture().convert("CMYK")),
        "jpeg profile exif": saved("JPEG", icc_profile=profile(), exif=exif(6)),
        "png": saved("PNG"),
        "png palette": saved("PNG", picture().quantize(16)),
        "png 1 bit": saved("PNG", picture().convert("1")),
        "png 16 bit": saved("PNG", picture().convert("I;16")),
        "png transparent": saved("PNG", transparent()),
        "webp": saved("WEBP"),
        "webp lossless": saved("WEBP", transparent(), lossless=True),
        "webp animated": saved("WEBP", save_all=True, append_images=turned(), duration=40, loop=2),
        "gif": saved("GIF"),
        "gif animated": saved("GIF", save_all=True, append_images=turned(), duration=40, loop=2),
        "avif": saved("AVIF", quality=60),
        "avif transparent": saved("AVIF", transparent()),
        "avif animated": saved("AVIF", save_all=True, append_images=turned(), duration=40),
        "tiff": saved("TIFF"),
        "tiff lzw": saved("TIFF", compression="tiff_lzw"),
        "tiff deflate": saved("TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": saved("TIFF", compression="jpeg"),
        "tiff cmyk": saved("TIFF", picture().convert("CMYK")),
        "tiff pages": saved("TIFF", save_all=True, append_images=turned()),
    }


@cache
def picture() -> Image.Image:
    return Image.open(photograph("coffee.png")).convert("RGB").resize(SIZE)


def transparent() -> Image.Image:
    image = picture().copy()
    image.putalpha(Image.linear_gradient("L").resize(SIZE))
    return image


def turned() -> list[Image.Image]:
    return [picture().rotate(30 * number) for number in range(1, 5)]


def saved(format_: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, format_, **options)
    return file.getvalue()


def profile(text: bytes = b"") -> bytes:
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return content + text


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112], made[0x010E] = orientation, SECRET.decode()
    return made


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def segment(kind: int, content: bytes) -> bytes:
    """Return a segment of a JPEG."""
    return bytes((0xFF, kind)) + struct.pack(">H", len(content) + 2) + content


def _after_start(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def _after_header(png: bytes, *chunks: bytes) -> bytes:
    return png[:33] + b"".join(chunks) + png[33:]


def _riff(chunks: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks


def _fine() -> Iterator[tuple[str, bytes]]:
    jpeg, png, gif, webp, tiff, avif = (saved(each) for each in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF"))
    yield from seeds().items()
    yield "jpeg with exif that says nothing", saved("JPEG", exif=b"Exif\0\0" + b"MM\0*" + b"\xff" * 400)
    # Its first directory is its own next one.
    loop = b"II*\0\x08\0\0\0" + struct.pack("<HHHIIHI", 1, 0x0112, 3, 1, 1, 8, 0) + b"\0\0" + SECRET
    yield "jpeg with exif that never ends", saved("JPEG", exif=b"Exif\0\0" + loop)
    yield "jpeg turned by 99", saved("JPEG", exif=_turned_by(99))
    yield "jpeg with a profile of nonsense", saved("JPEG", icc_profile=SECRET * 30)
    yield "jpeg with a part of a profile", _after_start(jpeg, segment(0xE2, b"ICC_PROFILE\0\x01\x05" + profile()[:300]))
    for field, at in (("link", 12), ("GRAY", 16), ("CMYK", 16), ("Lab ", 16), ("GRAY", 20), ("\xff" * 4, 128)):
        other = bytearray(profile())
        other[at : at + 4] = field.encode("latin-1")
        yield f"jpeg with a profile of {field!a} at {at}", saved("JPEG", icc_profile=bytes(other))
    yield "jpeg with more behind its profile", saved("JPEG", icc_profile=profile(SECRET))
    yield "png with a profile of nonsense", saved("PNG", icc_profile=SECRET * 30)
    bomb = zlib.compress(bytes(30_000_000), 9)
    yield "png with a profile that is a bomb", _after_header(png, chunk(b"iCCP", b"p\0\0" + bomb))
    yield "png with a text that is a bomb", _after_header(png, chunk(b"zTXt", b"Comment\0\0" + bomb))
    yield "png with exif of nonsense", _after_header(png, chunk(b"eXIf", SECRET))
    yield "tiff with a description", saved("TIFF", tiffinfo={270: SECRET.decode()})
    yield "jpeg as gif.gif", jpeg
    # Two things in one.
    yield "jpeg and zip", jpeg + _zip()
    yield "jpeg and pdf", _after_start(jpeg, segment(0xFE, b"%PDF-1.4\n" + SECRET + b"\n%%EOF"))
    yield "jpeg and php", _after_start(jpeg, segment(0xE1, b"<?php ?>" + SECRET))
    yield "gif and javascript", gif[:-1] + b"\x21\xfe" + bytes([len(SECRET)]) + SECRET + b"\0;" + b"*/=1;" + SECRET
    yield "png and html", _after_header(png, chunk(b"tEXt", b"Comment\0" + SECRET)) + SECRET
    yield "png and an unknown chunk", _after_header(png, chunk(b"scRT", SECRET))
    yield "webp and xmp", _riff(webp[12:] + b"XMP " + struct.pack("<I", len(SECRET) + 1) + SECRET + b"\0\0") + SECRET
    yield "avif and a box", avif + struct.pack(">I", 8 + len(SECRET)) + b"free" + SECRET
    yield "tiff and html", tiff + SECRET


def _turned_by(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("page.html", SECRET)
    return file.getvalue()


def _tiff_followed_by_nothing() -> bytes:
    tags = [(256, 2), (257, 2), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, 4)]
    directory = _directory(tags)
    nothing = 8 + len(directory) + 4
    return b"II*\0\x08\0\0\0" + directory + struct.pack("<I", nothing) + bytes(400)


def _directory(tags: Sequence[tuple[int, int]]) -> bytes:
    """Return a directory of a TIFF, less where the next one is."""
    entries = (struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<H", len(tags)) + b"".join(entries)


def raws() -> Iterator[tuple[str, bytes]]:
    """Yield cameras' raw files, with no more in them than tells what they are and a preview that libtiff would show."""
    for order in "<>":
        yield f"nef {order}", _raw(order, {254: 1, 330: 8})
        yield f"dng {order}", _raw(order, {50706: 0x0401})
        yield f"pef {order}", _raw(order, {262: 32803})
        yield f"cr2 {order}", _raw(order, {}, b"CR\2\0")


def _raw(order: str, special: Mapping[int, int], marker: bytes = b"") -> bytes:
    tags = {254: 0, 256: 16, 257: 12, 258: 8, 259: 1, 262: 1, 273: 16, 277: 1, 278: 12, 279: 192} | special
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 208) + marker.ljust(8, b"\0")
    entries = (struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return start + bytes(range(192)) + struct.pack(order + "H", len(tags)) + b"".join(entries) + bytes(4)


def _no_images() -> Iterator[tuple[str, bytes]]:
    svg = (
        b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY f SYSTEM "file:///etc/passwd">]>'
        b'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="60" height="40">'
        b"<script>alert(1)</script><text>&f;</text>"
        b'<image xlink:href="http://127.0.0.1:1/secret.png" width="60" height="40"/></svg>'
    )
    yield "svg.png", svg
    yield "svg.svgz", gzip.compress(svg)
    yield "html", b"<!doctype html><html>" + SECRET
    yield "pdf", b"%PDF-1.4\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript/JS(app.alert(1))>>>>endobj\n%%EOF"
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n(/etc/passwd) (r) file\n"
    yield "mvg", b"push graphic-context\nfill 'url(http://127.0.0.1:1/)'\npop graphic-context"
    yield "xpm", b'/* XPM */ static char *x[] = {"1 1 1 1", "a c #000000", "a"};'
    yield "zip", _zip()
    yield "elf", b"\x7fELF\x02\x01\x01" + bytes(64)
    for format_ in ("BMP", "ICO", "PPM", "TGA", "PCX", "DDS", "JPEG2000"):
        yield format_.lower(), saved(format_)
    yield "radiance", b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 2 +X 2\n" + bytes(16)
    yield "fits", b"SIMPLE  =                    T" + b" " * 2850
    yield "vips", b"\x08\xf2\xa6\xb6" + struct.pack("<II", 60, 40) + bytes(60)
    yield "matrix", b"60 40\n" + b"1 " * 2400
    yield from raws()
    yield "nothing", b""
    yield "one byte", b"\xff"


def _enormous() -> Iterator[tuple[str, bytes]]:
    jpeg, avif = saved("JPEG"), saved("AVIF")
    for side in (20_000, 2**31 - 1):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        pixels = chunk(b"IDAT", zlib.compress(bytes(1_000_000), 9))
        yield f"png of {side}", b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")
    frame = jpeg.index(b"\xff\xc0")
    yield "jpeg of 65535", jpeg[: frame + 5] + struct.pack(">HH", 65_535, 65_535) + jpeg[frame + 9 :]
    screen = b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(6)
    yield "gif of 65535", screen + b"\x2c" + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02\x44\x01\0;"
    lossless = b"\x2f" + struct.pack("<I", 16_383 | 16_383 << 14) + bytes(64)
    yield "webp of 16384", _riff(b"VP8L" + struct.pack("<I", len(lossless)) + lossless + b"\0" * (len(lossless) % 2))
    tags = [(256, 100_000), (257, 100_000), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 1)]
    yield "tiff of 100000", b"II*\0\x08\0\0\0" + _directory(tags) + bytes(4)
    extents = avif.index(b"ispe") + 8
    for side in (65_535, 2**30 + 60):
        yield f"avif of {side}", avif[:extents] + struct.pack(">II", side, side) + avif[extents + 8 :]
    dot = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\0"
    yield "gif of 5000 frames", b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) + dot * 5000 + b";"
    single = saved("WEBP", Image.new("RGBA", (1, 1), (1, 2, 3, 4)), lossless=True)
    coded = single[single.index(b"VP8L") :]
    of_one = bytes(6) + bytes(6) + struct.pack("<I", 40)[:3] + b"\0" + coded
    animation = b"ANIM" + struct.pack("<IIH", 6, 0, 0) + (b"ANMF" + struct.pack("<I", len(of_one)) + of_one) * 3000
    yield "webp of 3000 frames", _riff(b"VP8X" + struct.pack("<II", 10, 0x12) + bytes(6) + animation)
    pages = [Image.new("L", (1, 1))] * 600
    yield "tiff of 601 pages", saved("TIFF", pages[0], save_all=True, append_images=pages)


def _cut_off() -> Iterator[tuple[str, bytes]]:
    for name, whole in seeds().items():
        if name in ("gif animated", "avif animated", "tiff pages"):
            continue  # what is there is shown, as everywhere
        for share in (0.1, 0.5, 0.9):
            yield f"{name}, {share:.0%} of it", whole[: max(20, int(len(whole) * share))]
    yield "tiff whose next page is nothing", _tiff_followed_by_nothing()
