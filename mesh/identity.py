"""Who people are: verifies their access tokens by the keys and revocations of the identity feed.

Who services are is in `mesh.certificates`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import Protocol

import grpc
import jwt
from atelier.mesh.v1 import identity_pb2, identity_pb2_grpc
from cachetools import LRUCache

from mesh import urls
from mesh.context import TokenMissing, User
from mesh.errors import MeshError, Unauthenticated, Unavailable

ISSUER = "atelier"
AUDIENCE = "atelier"
ALGORITHM = "ES256"  # ECDSA on P-256 (RFC 7518, 3.4)
LEEWAY_SECONDS = 5  # the edge's too; more would let an expired token live on
CACHED_TOKENS = 10_000  # about 10 MB
REVOCABLE = ("jti", "sid", "gen")  # claims by whose value tokens are revoked: one, a session's, an account's

Revoked = Mapping[tuple[str, str], float]
"""(claim, value) of the tokens that are refused, and when the last of them has expired, in seconds since 1970."""

log = logging.getLogger(__name__)


class TokenExpired(Unauthenticated):
    reason = "TOKEN_EXPIRED"


class TokenInvalid(Unauthenticated):
    reason = "TOKEN_INVALID"


class TokenRevoked(Unauthenticated):
    reason = "TOKEN_REVOKED"


class KeysUnknown(Unavailable):
    reason = "KEYS_UNKNOWN"


class IdentityFeed(Protocol):
    """Where keys and revocations come from."""

    def watch(self) -> AsyncIterator[identity_pb2.WatchIdentityResponse]:
        """Yield all of them at once, then what is new."""


class RemoteIdentityFeed:
    """Satisfies `IdentityFeed` by asking for it; survives its absence."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = identity_pb2_grpc.IdentityServiceStub(channel)

    async def watch(self) -> AsyncIterator[identity_pb2.WatchIdentityResponse]:
        pause_seconds = 0.2
        while True:
            try:
                async for state in self._stub.WatchIdentity(identity_pb2.WatchIdentityRequest()):
                    pause_seconds = 0.2
                    yield state
            except MeshError as error:
                log.info("the identity feed is away: %s", error.message)
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, 5.0)


class Verifier:
    """Turns an access token into a User, each token once, until it is revoked."""

    def __init__(self, url_key: str = "") -> None:
        self._url_key = url_key
        self._keys: dict[str, jwt.PyJWK] = {}
        self._users: LRUCache[bytes, User] = LRUCache(CACHED_TOKENS)
        self.jwks: str | None = None
        self.revoked: Revoked = {}
        self.on_revocation: Callable[[], None] = lambda: None
        """Called when somebody may have been revoked who was verified before."""

    async def follow(self, feed: IdentityFeed) -> None:
        """Take over what `feed` says, for ever."""
        async for state in feed.watch():
            self.take(state.jwks, state.revocations)

    def take(self, jwks: str, revocations: Iterable[identity_pb2.Revocation] = ()) -> None:
        """Verify by the keys of `jwks`, a JSON Web Key Set, from now on, and refuse what is revoked.

        Revocations add to those before: nothing is ever taken back.
        """
        if jwks != self.jwks:
            keys = {key["kid"]: jwt.PyJWK(key) for key in json.loads(jwks)["keys"]}
            if keys.keys().isdisjoint(self._keys):
                self.revoked = {}  # with the tokens that the old keys signed
            self.jwks, self._keys = jwks, keys
            self._users.clear()  # a key may have been withdrawn
        told = {(each.claim, each.value): float(each.expire_time.ToSeconds()) for each in revocations}
        if told:
            self.revoked = {**self.revoked, **told}
            self.forget()
            self.on_revocation()

    def restore(self, jwks: str | None, revoked: Revoked) -> None:
        """Begin with what was known in an earlier life."""
        if jwks is not None:
            self.take(jwks)
            self.revoked = revoked

    def forget(self) -> bool:
        """Drop the revocations that no valid token can say any more; tell whether there were any."""
        now, before = time.time(), len(self.revoked)
        self.revoked = {what: expiry for what, expiry in self.revoked.items() if expiry > now}
        return len(self.revoked) < before

    def require_unrevoked(self, user: User) -> None:
        """Refuse who was verified and has been revoked since."""
        if not self.revoked.keys().isdisjoint(user.revocable):
            raise TokenRevoked("This access token has been revoked; refresh it, or sign in again.")

    async def check(self) -> None:
        """Raise KeysUnknown until the first keys are there."""
        if not self._keys:
            raise KeysUnknown("Tokens cannot be checked yet; try again.", retry_after_seconds=1)

    def user(self, authorization: str | None) -> User:
        """Return whom the header `Authorization: Bearer <token>` speaks for.

        Raises:
            TokenMissing, TokenExpired, TokenInvalid, TokenRevoked: no, an old, a wrong, or a revoked token.
            KeysUnknown: no keys are known yet.
        """
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise TokenMissing("Sign in first: send `Authorization: Bearer <access token>`.")
        digest = sha256(token.encode()).digest()
        user = self._users.get(digest)
        if user is None:
            user = self._users[digest] = self._verified(token)
        elif user.expire_time.timestamp() + LEEWAY_SECONDS < time.time():
            raise _expired()
        self.require_unrevoked(user)
        return user

    def signed(self, signature: str, target: str | None) -> User:
        """Return whom a signed URL speaks for. Raises what `urls.user` does."""
        return urls.user(self._url_key, signature, target)

    def _verified(self, token: str) -> User:
        if not self._keys:
            raise KeysUnknown("Tokens cannot be checked yet; try again.", retry_after_seconds=1)
        try:
            key = self._keys[jwt.get_unverified_header(token).get("kid", "")]
            claims = jwt.decode(
                token,
                key,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=ISSUER,
                leeway=LEEWAY_SECONDS,
                options={"require": ["sub", "exp", "iat", "role", *REVOCABLE]},
            )
        except jwt.ExpiredSignatureError:
            raise _expired() from None
        except (jwt.InvalidTokenError, KeyError):
            raise TokenInvalid("The access token is not one of ours; sign in again.") from None
        return User(
            user_id=claims["sub"],
            role=claims["role"],
            session_id=claims["sid"],
            token=token,
            expire_time=datetime.fromtimestamp(claims["exp"], UTC),
            revocable=tuple((claim, str(claims[claim])) for claim in REVOCABLE),
        )


def _expired() -> TokenExpired:
    return TokenExpired("The access token has expired; refresh it.")
