"""Opaque, prefixed, time-ordered ids: `tsk_` and a UUIDv7 (RFC 9562) in lower-case base32hex (RFC 4648)."""

from __future__ import annotations

from base64 import b32hexdecode, b32hexencode

import uuid_utils


def new(prefix: str) -> str:
    """Return a new id; ids of one process sort by the time they were made, as text too.

    base32hex, not base32: only its alphabet keeps the order of the bytes.
    """
    return f"{prefix}_{_text(uuid_utils.uuid7().bytes)}"


def numbered(prefix: str, parent: str, number: int) -> str:
    """Return the id of a parent's part: the same whenever it is asked for; a parent's ids sort by their numbers.

    Args:
        prefix: of the part's id.
        parent: an id from `new`.
        number: 0..4095; takes the place of the twelve bits after the version, which no time is in.
    """
    whole = bytearray(b32hexdecode(parent.partition("_")[2].upper() + "======"))
    whole[6] = whole[6] & 0xF0 | number >> 8
    whole[7] = number & 0xFF
    return f"{prefix}_{_text(bytes(whole))}"


def _text(whole: bytes) -> str:
    return b32hexencode(whole).decode().rstrip("=").lower()
