"""Opaque, prefixed, time-ordered ids: `tsk_` and a UUIDv7 (RFC 9562) in lower-case base32hex (RFC 4648)."""

from __future__ import annotations

from base64 import b32hexencode

import uuid_utils


def new(prefix: str) -> str:
    """Return a new id; ids of one process sort by the time they were made, as text too.

    base32hex, not base32: only its alphabet keeps the order of the bytes.
    """
    return f"{prefix}_{b32hexencode(uuid_utils.uuid7().bytes).decode().rstrip('=').lower()}"
