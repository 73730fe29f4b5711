"""Replicas of the auth service on real servers and one database, beside a stub of user, under a held clock."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import jwt
import pytest
from atelier.auth.v1 import auth_pb2, auth_pb2_grpc
from atelier.mesh.v1 import identity_pb2, identity_pb2_grpc
from atelier.user.v1 import user_pb2, user_pb2_grpc

from mesh import database
from mesh.database import Database
from mesh.errors import MeshError
from services.auth.feed import Feed
from services.auth.handlers import AuthService, IdentityService
from services.auth.keys import KeyRing
from services.auth.repository import SqlKeys, SqlRevocations, SqlSessions
from tests.databases import NewDatabase
from tests.held_clock import HeldClock
from tests.mesh_server import Server, serving


@dataclass
class StubUsers(user_pb2_grpc.UserServiceServicer):
    """Says the same of every account."""

    role: user_pb2.User.Role.ValueType = user_pb2.User.ROLE_USER
    status: user_pb2.User.Status.ValueType = user_pb2.User.STATUS_ACTIVE
    generation: int = 1
    failure: MeshError | None = None

    async def GetAccount(self, request, context):
        if self.failure:
            raise self.failure
        return user_pb2.Account(
            user_id=request.user_id,
            role=self.role,
            status=self.status,
            generation=f"{request.user_id}/{self.generation}",
        )


@dataclass
class Home:
    """What a test of the auth service needs at hand."""

    server: Server
    sql: Database
    sessions: SqlSessions
    keys: KeyRing
    feed: Feed
    users: StubUsers
    clock: HeldClock

    def stub(self, user: str | None = None, role: str = "ROLE_USER", caller: str = "edge"):
        return auth_pb2_grpc.AuthServiceStub(self.server.channel(user, role, caller))

    def identity(self, caller: str = "control"):
        return identity_pb2_grpc.IdentityServiceStub(self.server.channel(caller=caller))

    async def issued(self, user_id: str = "usr_1", role: str = "ROLE_USER") -> auth_pb2.Tokens:
        request = auth_pb2.IssueTokensRequest(user_id=user_id, role=role, generation=f"{user_id}/1")
        return await self.stub(caller="user").IssueTokens(request)

    async def refreshed(self, refresh_token: str) -> auth_pb2.Tokens:
        return await self.stub().RefreshTokens(auth_pb2.RefreshTokensRequest(refresh_token=refresh_token))

    async def revoke(self, refresh_token: str, *, all_sessions: bool = False) -> None:
        await self.stub().RevokeSession(
            auth_pb2.RevokeSessionRequest(refresh_token=refresh_token, all_sessions=all_sessions)
        )

    async def rotate(self) -> auth_pb2.RotateKeysResponse:
        return await self.stub("usr_admin", "ROLE_ADMIN").RotateKeys(auth_pb2.RotateKeysRequest())

    async def pass_time(self, time: timedelta) -> None:
        self.clock.time += time
        await self.keys.refresh()

    async def published(self) -> str:
        """Return the keys that the feed sends at once."""
        return (await self.told()).jwks

    async def told(self) -> identity_pb2.WatchIdentityResponse:
        """Return what the feed tells at once to whoever comes now."""
        await self.feed.refresh()
        return await anext(self.feed.watch())

    async def revoked(self) -> list[tuple[str, str]]:
        """Return what the feed says is revoked."""
        return sorted((each.claim, each.value) for each in (await self.told()).revocations)

    async def claims(self, access_token: str) -> dict[str, str | int]:
        """Return what a token says, if a published key signed it; the held clock may be ahead of the real one."""
        keys = {key["kid"]: jwt.PyJWK(key) for key in json.loads(await self.published())["keys"]}
        key = keys[jwt.get_unverified_header(access_token)["kid"]]
        timeless = {"verify_iat": False, "verify_exp": False}
        return jwt.decode(access_token, key, algorithms=["ES256"], audience="atelier", options=timeless)

    def another_replica(self, **settings: int) -> tuple[KeyRing, Feed]:
        keys = KeyRing(SqlKeys(self.sql), self.clock)
        return keys, Feed(keys, SqlRevocations(self.sql), **settings)


@pytest.fixture
async def home(new_database: NewDatabase) -> AsyncIterator[Home]:
    url = await new_database("auth")
    users, clock = StubUsers(), HeldClock()
    async with (
        database.opened(url) as sql,
        serving(partial(user_pb2_grpc.add_UserServiceServicer_to_server, users)) as user_server,
    ):
        sessions, revocations, keys = SqlSessions(sql), SqlRevocations(sql), KeyRing(SqlKeys(sql), clock)
        feed = Feed(keys, revocations)
        await feed.refresh()
        user = user_pb2_grpc.UserServiceStub(user_server.channel(caller="auth"))
        async with serving(
            partial(
                auth_pb2_grpc.add_AuthServiceServicer_to_server, AuthService(sessions, revocations, keys, user, clock)
            ),
            partial(identity_pb2_grpc.add_IdentityServiceServicer_to_server, IdentityService(feed)),
        ) as server:
            yield Home(server, sql, sessions, keys, feed, users, clock)
