"""When a refresh token is good, which key signs, and what is revoked. No I/O, no cryptography, no protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from mesh.errors import PermissionDenied, Unauthenticated

ACCESS_LIFE = timedelta(minutes=5)
REFRESH_LIFE = timedelta(days=30)

REUSE_GRACE = timedelta(seconds=30)
"""How long a used refresh token still works: the answer with the new one may have been lost, or two tabs raced."""

KEY_LEAD = timedelta(seconds=60)
"""How long a key is published before it signs, so that every verifier has it by then."""

KEY_LIFE = timedelta(days=30)
"""How long a key signs before it is replaced by itself."""

VERIFIER_SKEW = timedelta(minutes=1)
"""How long verifiers' clocks and leeway may keep a token alive after its expiry."""

REVOCATION_LIFE = ACCESS_LIFE + VERIFIER_SKEW
"""How long a revocation is told: as long as the tokens it is about can be taken for valid."""

MAX_REVOCATIONS = 20_000
"""More than the edges and services are asked to remember: then all tokens end, by a new key."""

FORGET = "forget"
"""The work that one replica does for all; the name of its lock and of its fence."""


class RefreshTokenInvalid(Unauthenticated):
    reason = "REFRESH_TOKEN_INVALID"


class SessionRevoked(Unauthenticated):
    reason = "SESSION_REVOKED"


class AccountDisabled(PermissionDenied):
    reason = "ACCOUNT_DISABLED"


@dataclass(frozen=True, slots=True)
class Session:
    """One sign-in of a user."""

    session_id: str
    user_id: str
    create_time: datetime
    revoke_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class RefreshToken:
    """A session's refresh token, known by its hash only. `use_time` is when it was first exchanged."""

    token_hash: bytes
    session_id: str
    expire_time: datetime
    use_time: datetime | None = None


@dataclass(frozen=True, slots=True)
class Revocation:
    """What is refused: the access tokens in which `claim` is `value`, until the last of them has ended."""

    claim: str
    value: str
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key pair. `number` counts the keys of the installation from 1; it signs from `sign_time` on."""

    key_id: str
    number: int
    private_pem: str = field(repr=False)
    sign_time: datetime


class Sessions(Protocol):
    """Where sessions and refresh tokens are kept."""

    async def open(self, session: Session, token: RefreshToken) -> None:
        """Store a session with its first refresh token."""

    async def find(self, token_hash: bytes) -> Session | None:
        """Return the session of a refresh token, whatever state both are in."""

    async def exchange(self, token_hash: bytes, successor: RefreshToken, now: datetime) -> None:
        """Use up a refresh token and store its successor.

        Raises:
            RefreshTokenInvalid: it is unknown or has expired.
            SessionRevoked: its session has ended, or ends now because the token was used again too late.
        """

    async def revoke(self, session: Session, now: datetime, *, all_sessions: bool) -> None:
        """End a session, or every session of its user, and revoke their access tokens."""

    async def forget(self, now: datetime, fence: int) -> None:
        """Drop expired refresh tokens and the sessions that have none left; `fence` is of the work FORGET."""


class Revocations(Protocol):
    """Where it is kept what is revoked, for all replicas."""

    async def add(self, revocation: Revocation, now: datetime) -> None:
        """Revoke; drop what nobody needs to be told any more."""

    async def version(self) -> object:
        """Return what is another value after every change."""

    async def all(self) -> list[Revocation]:
        """Return everything that is revoked, and perhaps some of which every token has ended."""


class Signer(Protocol):
    """Signs access tokens."""

    def signed(self, claims: Mapping[str, str | int]) -> str:
        """Return a token that says `claims`, and by whom and for whom it is."""

    async def rotate(self) -> SigningKey:
        """Return the key that will sign next, made now unless one is waiting already."""


class Keys(Protocol):
    """Where signing keys are kept, for all replicas."""

    async def all(self) -> list[SigningKey]:
        """Return every key that is still published or will be."""

    async def add(self, key: SigningKey) -> bool:
        """Store a key; return False, storing nothing, when another replica has stored one with its number."""

    async def replace(self, key: SigningKey) -> None:
        """Store a key in place of all others, and drop all revocations: they were of tokens of the others.

        Does nothing when another replica has stored a key with its number.
        """

    async def drop(self, key_ids: Sequence[str]) -> None:
        """Forget keys whose tokens have all expired."""


def access_claims(session: Session, role: str, generation: str, token_id: str, now: datetime) -> dict[str, str | int]:
    """Return the claims of an access token (RFC 7519): whose it is, of which session, in which role, until when.

    `gen` is the account's generation in which it had that role.
    """
    return {
        "sub": session.user_id,
        "jti": token_id,
        "sid": session.session_id,
        "gen": generation,
        "role": role,
        "iat": int(now.timestamp()),
        "exp": int(access_expire_time(now).timestamp()),
    }


def access_expire_time(now: datetime) -> datetime:
    """Return when an access token that is issued now ends: whole seconds, as the claim counts."""
    return (now + ACCESS_LIFE).replace(microsecond=0)


def recently_refreshed(now: datetime) -> datetime:
    """Return the expiry of a refresh token after which its session may still have a valid access token."""
    return now + REFRESH_LIFE - REVOCATION_LIFE


def session_revocation(session_id: str, now: datetime) -> Revocation:
    return Revocation("sid", session_id, now + REVOCATION_LIFE)


def generation_revocation(generation: str, now: datetime) -> Revocation:
    return Revocation("gen", generation, now + REVOCATION_LIFE)


def replayed(token: RefreshToken, now: datetime) -> bool:
    """Tell whether exchanging `token` now is somebody using a stolen copy."""
    return token.use_time is not None and now - token.use_time > REUSE_GRACE


def require_known(session: Session | None) -> Session:
    if session is None:
        raise _invalid()
    return session


def require_live(token: RefreshToken | None, now: datetime) -> RefreshToken:
    if token is None or token.expire_time <= now:
        raise _invalid()
    return token


def require_active(user_id: str, *, active: bool) -> None:
    if not active:
        raise AccountDisabled("This account is disabled; ask an administrator.", metadata={"user_id": user_id})


def _invalid() -> RefreshTokenInvalid:
    return RefreshTokenInvalid("The refresh token is unknown or has expired. Sign in again.")


def session_revoked(session_id: str) -> SessionRevoked:
    return SessionRevoked("The session has ended. Sign in again.", metadata={"session_id": session_id})


def signing(keys: Sequence[SigningKey], now: datetime) -> SigningKey:
    """Return the key that signs now: the newest whose time has come."""
    begun = [key for key in keys if key.sign_time <= now]
    # A replica whose clock is behind finds none in a new installation: the first key is right all the same.
    return max(begun, key=lambda key: key.number) if begun else min(keys, key=lambda key: key.number)


def published(keys: Sequence[SigningKey], now: datetime) -> list[SigningKey]:
    """Return the keys whose tokens may be presented now or later, oldest first."""
    kept = []
    for key in sorted(keys, key=lambda key: key.number):
        # Its last token was signed when the key after it began.
        followers = [other.sign_time for other in keys if other.number > key.number]
        if not followers or now < min(followers) + ACCESS_LIFE + VERIFIER_SKEW:
            kept.append(key)
    return kept


def due(keys: Sequence[SigningKey], now: datetime) -> bool:
    """Tell whether a new key must be made by itself: there is none, or the newest has signed for its life."""
    return not keys or now - max(key.sign_time for key in keys) >= KEY_LIFE


def awaited(keys: Sequence[SigningKey], now: datetime) -> SigningKey | None:
    """Return the key that is published but does not sign yet; making another one meanwhile would gain nothing."""
    return next((key for key in keys if key.sign_time > now), None)


def next_place(keys: Sequence[SigningKey], now: datetime) -> tuple[int, datetime]:
    """Return number and sign time of the next key. The very first signs at once: nobody has another."""
    if not keys:
        return 1, now
    return max(key.number for key in keys) + 1, now + KEY_LEAD
