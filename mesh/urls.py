"""URLs that speak for a user to whoever has them, until they expire: an `<img>` or a download link sends no token.

Such a URL ends in `signature=…`, a JWT under HMAC-SHA256 (RFC 7515) with the installation's `url.key`, which those hold
who sign and who verify. It is good for that path with that query, to the letter, and nothing else.
"""

from __future__ import annotations

from datetime import UTC, datetime

import jwt

from mesh.context import User
from mesh.errors import PermissionDenied

AUDIENCE = "url"
KEY = "url.key"
PARAMETER = "signature"  # of the query, and its last
SIGNATURE_KEY = "x-atelier-signature"  # of the metadata or header that carries it on, inside the mesh


_CLAIMS = ["exp", "aud", "sub", "target"]


class UrlExpired(PermissionDenied):
    reason = "URL_EXPIRED"


class UrlInvalid(PermissionDenied):
    reason = "URL_INVALID"


def signed(key: str, user_id: str, target: str, expire_time: datetime) -> str:
    """Return `target`, a path and perhaps a query, with a signature for a user."""
    claims = {"aud": AUDIENCE, "sub": user_id, "exp": int(expire_time.timestamp()), "target": target}
    return f"{target}{'&' if '?' in target else '?'}{PARAMETER}={jwt.encode(claims, key, algorithm='HS256')}"


def parts(path: str, query: str) -> tuple[str, str]:
    """Return what a URL's signature must be of, and the signature; empty without one."""
    rest, sign, signature = f"?{query}".rpartition(f"{PARAMETER}=")
    if not sign or rest[-1:] not in {"?", "&"}:
        return path + (f"?{query}" if query else ""), ""
    return path + rest[:-1], signature


def user(key: str, signature: str, target: str | None) -> User:
    """Return whom a URL speaks for.

    Args:
        key: the installation's.
        signature: which it came with.
        target: what it is of; None inside the mesh, where who verified that passes it on.

    Raises:
        UrlExpired: its time is over.
        UrlInvalid: not signed by us, or for another URL.
    """
    try:
        claims = jwt.decode(signature, key, algorithms=["HS256"], audience=AUDIENCE, options={"require": _CLAIMS})
    except jwt.ExpiredSignatureError:
        raise UrlExpired("This URL has expired; ask for a new one.") from None
    except jwt.InvalidTokenError:
        raise _invalid() from None
    if target is not None and claims["target"] != target:
        raise _invalid()
    return User(
        user_id=claims["sub"],
        role="",
        session_id="",
        token="",
        expire_time=datetime.fromtimestamp(claims["exp"], UTC),
        signature=signature,
    )


def _invalid() -> UrlInvalid:
    return UrlInvalid("This URL was not signed as it is; use it to the letter, or ask for a new one.")
