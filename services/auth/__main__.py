"""Runs the auth service: `python -m services.auth`. Wiring only."""

from functools import partial

import uvloop
from atelier.auth.v1.auth_pb2_grpc import add_AuthServiceServicer_to_server
from atelier.mesh.v1.identity_pb2_grpc import add_IdentityServiceServicer_to_server
from atelier.user.v1.user_pb2_grpc import UserServiceStub

from mesh import certificates, channel, database, lock, service
from mesh.clock import SystemClock
from services.auth.config import Config
from services.auth.feed import Feed
from services.auth.handlers import AuthService, IdentityService
from services.auth.keys import KeyRing
from services.auth.repository import SqlKeys, SqlRevocations, SqlSessions
from services.auth.tables import lock_table
from services.auth.upkeep import Upkeep


async def main(config: Config) -> None:
    async with (
        certificates.kept(config) as leaf,
        database.opened(config.database_url) as sql,
        channel.opened("user", config, leaf) as user,
    ):
        clock, sessions, revocations = SystemClock(), SqlSessions(sql), SqlRevocations(sql)
        keys = KeyRing(SqlKeys(sql), clock)
        feed = Feed(keys, revocations)
        auth = AuthService(sessions, revocations, keys, UserServiceStub(user), clock)
        await service.serve(
            config,
            leaf,
            partial(add_AuthServiceServicer_to_server, auth),
            partial(add_IdentityServiceServicer_to_server, IdentityService(feed)),
            dependencies=[sql.check],
            background=[*feed.work(), *Upkeep(sessions, clock).work(lock.Locks(config, sql, lock_table))],
            identity=feed,
        )


if __name__ == "__main__":
    uvloop.run(main(Config()))
