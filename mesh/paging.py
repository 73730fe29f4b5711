"""Opaque page tokens of key-set pages."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence

from mesh.errors import InvalidArgument

DEFAULT_PAGE_SIZE = 50


class PageTokenMalformed(InvalidArgument):
    reason = "PAGE_TOKEN_MALFORMED"


def encode(key: Sequence[str | int]) -> str:
    """Return the token of the page that begins after `key`."""
    return urlsafe_b64encode(json.dumps(list(key), separators=(",", ":")).encode()).decode().rstrip("=")


def decode(token: str, kinds: Sequence[type[str | int]]) -> tuple[str | int, ...]:
    """Return the key in `token`, whose parts have the types `kinds`.

    Raises:
        PageTokenMalformed: it is not a token of this list.
    """
    try:
        key = json.loads(urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        json.dumps(key, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError):
        key = None
    if not isinstance(key, list) or [type(part) for part in key] != list(kinds) or not all(map(_fits, key)):
        raise malformed()
    return tuple(key)


def malformed() -> PageTokenMalformed:
    """Return the refusal of a token whose key no row of the list can have."""
    return PageTokenMalformed(
        "pageToken is not one that this list gave; leave it empty to begin at the first page.",
        violations={"pageToken": "use nextPageToken of the page before"},
    )


def _fits(part: str | int) -> bool:
    """Tell whether a database can compare a column with `part`: its integers have 64 bits, its texts no U+0000."""
    return "\0" not in part if isinstance(part, str) else -(2**63) <= part < 2**63
