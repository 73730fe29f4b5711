"""A JPEG stream without what is not the picture (ITU-T T.81, annex B). Decodes nothing."""

from __future__ import annotations

from struct import unpack_from

END = b"\xff\xd9"
_START, _SCAN, _ADOBE, _COMMENT = 0xD8, 0xDA, 0xEE, 0xFE
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD8)}  # TEM and restart markers
_APPLICATION = range(0xE0, 0xF0)


def bare(stream: bytes) -> bytes | None:
    """Return a JPEG without its APPn segments, comments and whatever follows its end; None when it makes no sense.

    Its colours are read as before: Adobe's segment, which may say otherwise, must say what is so without it.
    """
    kept, at = bytearray(b"\xff\xd8"), 2
    if not stream.startswith(b"\xff\xd8\xff"):
        return None
    while at + 4 <= len(stream) and stream[at] == 0xFF:
        kind = stream[at + 1]
        if kind == 0xFF:  # fill byte
            at += 1
            continue
        if kind == _START or kind in _WITHOUT_LENGTH:
            return None
        if kind == _ADOBE and stream[at + 15 : at + 16] != b"\x01":  # the transform: 1 is YCbCr
            return None
        end = at + 2 + int(unpack_from(">H", stream, at + 2)[0])
        if kind == _SCAN:
            end = _after_scan(stream, end)
        if end > len(stream):
            return None
        if kind not in _APPLICATION and kind != _COMMENT:
            kept += stream[at:end]
        at = end
        if stream[at : at + 2] == END:
            return bytes(kept) + END
    return None


def _after_scan(stream: bytes, at: int) -> int:
    """Return where the next marker stands that is none of the scan's own."""
    while (at := stream.find(b"\xff", at)) >= 0:
        following = stream[at + 1 : at + 2]
        if following and following[0] not in (0x00, *_WITHOUT_LENGTH):
            return at
        at += 2
    return len(stream) + 1
