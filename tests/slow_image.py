"""A small AVIF that takes long to decode: one tile of noise, shown many times."""

from __future__ import annotations

import io
import os
import struct
from functools import cache

from PIL import Image

TILE_PX = 666
ROW = 15  # tiles: 99.8 megapixels, of 100 that are taken; libheif takes 255 tiles


@cache
def slow_image() -> bytes:
    """Return it: a grid (ISO/IEC 23008-12, 6.6.2.3) of items that all lie at one place of the file."""
    tile = io.BytesIO()
    noise = Image.frombytes("RGB", (TILE_PX, TILE_PX), os.urandom(3 * TILE_PX * TILE_PX))
    noise.save(tile, "AVIF", quality=95, speed=10, subsampling="4:2:0")
    whole = tile.getvalue()
    coded, config = _content(whole, b"mdat"), _content(whole, b"av1C")

    side, count = TILE_PX * ROW, ROW * ROW
    grid = struct.pack(">BBBBHH", 0, 0, ROW - 1, ROW - 1, side, side)
    items = range(2, count + 2)  # the first is the grid

    def meta(at: int) -> bytes:
        """Return the box that says what lies in the file whose data begins `at` bytes from its start."""
        places = [(1, at, len(grid)), *((item, at + len(grid), len(coded)) for item in items)]
        iloc = struct.pack(">HH", 0x4400, len(places)) + b"".join(
            struct.pack(">HHHII", n, 0, 1, o, s) for n, o, s in places
        )
        kinds = [(1, b"grid"), *((item, b"av01") for item in items)]
        iinf = struct.pack(">H", len(kinds)) + b"".join(
            _full(b"infe", struct.pack(">HH4sB", n, 0, k, 0), 2) for n, k in kinds
        )
        iref = _box(b"dimg", struct.pack(f">HH{count}H", 1, count, *items))
        properties = [
            _full(b"ispe", struct.pack(">II", side, side)),
            _full(b"ispe", struct.pack(">II", TILE_PX, TILE_PX)),
            _box(b"av1C", config),
            _full(b"pixi", bytes([3, 8, 8, 8])),
        ]
        theirs = [(1, (1, 4)), *((item, (2, 0x80 | 3, 4)) for item in items)]
        ipma = struct.pack(">I", len(theirs)) + b"".join(struct.pack(">HB", n, len(p)) + bytes(p) for n, p in theirs)
        return _full(
            b"meta",
            _full(b"hdlr", struct.pack(">I4s12xx", 0, b"pict"))
            + _full(b"pitm", struct.pack(">H", 1))
            + _full(b"iloc", iloc)
            + _full(b"iinf", iinf)
            + _full(b"iref", iref)
            + _box(b"iprp", _box(b"ipco", b"".join(properties)) + _full(b"ipma", ipma)),
        )

    head = _box(b"ftyp", b"avif\0\0\0\0avifmif1miaf")
    begin = len(head) + len(meta(0)) + 8
    return head + meta(begin) + _box(b"mdat", grid + coded)


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _full(kind: bytes, content: bytes, version: int = 0) -> bytes:
    return _box(kind, struct.pack(">I", version << 24) + content)


def _content(file: bytes, kind: bytes) -> bytes:
    """Return what the only box of a kind holds."""
    at = file.index(kind)
    return file[at + 4 : at - 4 + struct.unpack_from(">I", file, at - 4)[0]]
