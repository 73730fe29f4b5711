"""What bytes are, by their own signature, and whether that is what they were called. Pure.

A table of our own: the packages for this guess from a few bytes and from names, and an upload's name is
its sender's word.
"""

from __future__ import annotations

import codecs
import re
from pathlib import PurePath

from services.storage.domain import HEAD_BYTES, ContentTypeMismatch

UNKNOWN = "application/octet-stream"
TEXT = "text/plain"

_PREFIXES = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"II*\x00", "image/tiff"),
    (b"MM\x00*", "image/tiff"),
    (b"II+\x00", "image/tiff"),  # BigTIFF
    (b"MM\x00+", "image/tiff"),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "image/jxl"),
    (b"%PDF-", "application/pdf"),
)
# ISO/IEC 23008-12 and the AVIF specification: brands of the `ftyp` box; the more special ones first.
_BRANDS = (
    ({b"avif", b"avis"}, "image/avif"),
    ({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}, "image/heic"),
    ({b"mif1", b"msf1"}, "image/heif"),
)
_BMP_HEADER_SIZES = {12, 16, 40, 52, 56, 64, 108, 124}
# Whatever may come before the root element: declaration, comments, doctype.
_SVG = re.compile(r"\ufeff?\s*(<\?xml[^>]*>\s*|<!--.*?-->\s*|<!DOCTYPE[^>\[]*(\[.*?\])?\s*>\s*)*<svg[\s>/]", re.DOTALL)
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")

_ALIASES = {
    "image/jpg": "image/jpeg",
    "image/pjpeg": "image/jpeg",
    "image/x-png": "image/png",
    "image/apng": "image/png",
    "image/heif": "image/heic",  # one container; senders use either name
    "image/x-ms-bmp": "image/bmp",
    "image/x-bmp": "image/bmp",
    # Cameras' raw files are TIFFs by their signature; media workers tell them apart.
    "image/x-nikon-nef": "image/tiff",
    "image/x-canon-cr2": "image/tiff",
    "image/x-sony-arw": "image/tiff",
    "image/x-pentax-pef": "image/tiff",
    "image/x-adobe-dng": "image/tiff",
    "image/dng": "image/tiff",
}
_BY_SUFFIX = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".gif": "image/gif",
    ".webp": "image/webp",
    ".avif": "image/avif",
    ".heic": "image/heic",
    ".heif": "image/heif",
    ".jxl": "image/jxl",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".bmp": "image/bmp",
    ".svg": "image/svg+xml",
}


def detected_type(head: bytes) -> str:
    """Return the media type of bytes that begin with `head`; `application/octet-stream` when unknown."""
    for prefix, content_type in _PREFIXES:
        if head.startswith(prefix):
            return content_type
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    if head[4:8] == b"ftyp":
        box = head[8 : min(int.from_bytes(head[:4], "big"), len(head))]
        brands = {box[at : at + 4] for at in range(0, len(box), 4) if at != 4}  # 4: the minor version
        return next((content_type for known, content_type in _BRANDS if known & brands), UNKNOWN)
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES:
        return "image/bmp"
    return _text_type(head)


def _text_type(head: bytes) -> str:
    try:
        # Incremental: a full head may end in the middle of a character.
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < HEAD_BYTES)
    except UnicodeDecodeError:
        return UNKNOWN
    if _NOT_TEXT.search(text):
        return UNKNOWN
    return "image/svg+xml" if _SVG.match(text) else TEXT


def require_type(name: str, declared: str, detected: str) -> None:
    """Refuse bytes that are not what they were called.

    Args:
        name: the file's name; one that ends like an image's promises an image.
        declared: the `Content-Type` they came with; may be empty.
        detected: what they are, from `detected_type`.

    Raises:
        ContentTypeMismatch: an image was declared or promised and they are none, or another kind; or they
            came as a form instead of raw.
    """
    declared = declared.partition(";")[0].strip().lower()
    promised = _BY_SUFFIX.get(PurePath(name).suffix.lower(), "")
    if _contradicts(declared, detected):
        _refuse(declared, detected)
    if promised and not detected.startswith("image/"):
        _refuse(promised, detected)


def _contradicts(declared: str, detected: str) -> bool:
    family = declared.partition("/")[0]
    if family == "image" or declared == "application/pdf":
        return _ALIASES.get(declared, declared) != _ALIASES.get(detected, detected)
    if family == "text":
        return detected not in {TEXT, "image/svg+xml"}
    # Any other declaration cannot be checked, and many a client sends one of its own accord.
    return family == "multipart"


def _refuse(declared: str, detected: str) -> None:
    raise ContentTypeMismatch(
        f"The bytes were called {declared} and are {detected}; send a file's own bytes as the raw body.",
        metadata={"declared": declared, "detected": detected},
    )
