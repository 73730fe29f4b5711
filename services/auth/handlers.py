"""atelier.auth.v1.AuthService and atelier.mesh.v1.IdentityService: read the request, call the domain, answer."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator
from datetime import datetime

from atelier.auth.v1 import auth_pb2 as pb
from atelier.auth.v1 import auth_pb2_grpc
from atelier.mesh.v1 import identity_pb2, identity_pb2_grpc
from atelier.user.v1 import user_pb2, user_pb2_grpc

from mesh import ids
from mesh.clock import Clock
from mesh.identity import IdentityFeed
from services.auth import convert
from services.auth.domain import (
    REFRESH_LIFE,
    RefreshToken,
    Revocations,
    Session,
    Sessions,
    Signer,
    access_claims,
    access_expire_time,
    generation_revocation,
    require_active,
    require_known,
)

REFRESH_TOKEN_BYTES = 32  # 256 bits, so that a fast hash of it suffices


class AuthService(auth_pb2_grpc.AuthServiceServicer):
    """Raises MeshError only; the mesh turns it into a status.

    Args:
        sessions: where sessions are kept.
        revocations: where it is kept what else is revoked.
        signer: signs access tokens.
        users: knows the present role and status of an account.
        clock: the time of day.
    """

    def __init__(
        self,
        sessions: Sessions,
        revocations: Revocations,
        signer: Signer,
        users: user_pb2_grpc.UserServiceAsyncStub,
        clock: Clock,
    ) -> None:
        self._sessions = sessions
        self._revocations = revocations
        self._signer = signer
        self._users = users
        self._clock = clock

    async def IssueTokens(self, request: pb.IssueTokensRequest, _: object) -> pb.Tokens:
        now = self._clock.now()
        session = Session(session_id=ids.new("ses"), user_id=request.user_id, create_time=now)
        secret, token = _new_refresh_token(session, now)
        await self._sessions.open(session, token)
        return self._tokens(session, request.role, request.generation, secret, now)

    async def RefreshTokens(self, request: pb.RefreshTokensRequest, _: object) -> pb.Tokens:
        token_hash = _hash(request.refresh_token)
        session = require_known(await self._sessions.find(token_hash))
        account = await self._users.GetAccount(user_pb2.GetAccountRequest(user_id=session.user_id))
        now = self._clock.now()
        secret, successor = _new_refresh_token(session, now)
        require_active(session.user_id, active=convert.is_active(account))
        await self._sessions.exchange(token_hash, successor, now)
        return self._tokens(session, convert.role_from(account), account.generation, secret, now)

    async def RevokeSession(self, request: pb.RevokeSessionRequest, _: object) -> pb.RevokeSessionResponse:
        session = await self._sessions.find(_hash(request.refresh_token))
        if session is not None:
            await self._sessions.revoke(session, self._clock.now(), all_sessions=request.all_sessions)
        return pb.RevokeSessionResponse()

    async def RevokeGeneration(self, request: pb.RevokeGenerationRequest, _: object) -> pb.RevokeGenerationResponse:
        now = self._clock.now()
        await self._revocations.add(generation_revocation(request.generation, now), now)
        return pb.RevokeGenerationResponse()

    async def RotateKeys(self, _request: pb.RotateKeysRequest, _: object) -> pb.RotateKeysResponse:
        return convert.key_to_proto(await self._signer.rotate())

    def _tokens(self, session: Session, role: str, generation: str, refresh_token: str, now: datetime) -> pb.Tokens:
        access_token = self._signer.signed(access_claims(session, role, generation, ids.new("jti"), now))
        return convert.tokens_to_proto(access_token, refresh_token, access_expire_time(now))


class IdentityService(identity_pb2_grpc.IdentityServiceServicer):
    """Tells whoever checks tokens which to believe."""

    def __init__(self, feed: IdentityFeed) -> None:
        self._feed = feed

    async def WatchIdentity(
        self, _request: identity_pb2.WatchIdentityRequest, _: object
    ) -> AsyncIterator[identity_pb2.WatchIdentityResponse]:
        async for state in self._feed.watch():
            yield state


def _new_refresh_token(session: Session, now: datetime) -> tuple[str, RefreshToken]:
    """Return the token for its owner and what is stored of it."""
    secret = secrets.token_urlsafe(REFRESH_TOKEN_BYTES)
    return secret, RefreshToken(token_hash=_hash(secret), session_id=session.session_id, expire_time=now + REFRESH_LIFE)


def _hash(refresh_token: str) -> bytes:
    return hashlib.sha256(refresh_token.encode()).digest()
