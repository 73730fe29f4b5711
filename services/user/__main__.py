"""Runs the user service: `python -m services.user`. Wiring only."""

from functools import partial

import uvloop
from atelier.auth.v1.auth_pb2_grpc import AuthServiceStub
from atelier.task.v1.task_pb2_grpc import TaskServiceStub
from atelier.user.v1.user_pb2_grpc import add_UserServiceServicer_to_server

from mesh import broker, certificates, channel, database, lock, service
from mesh.clock import SystemClock
from services.user.config import Config
from services.user.consumers import TaskEvents
from services.user.handlers import UserService
from services.user.passwords import Argon2Passwords
from services.user.repository import SqlAccounts, SqlQuotas
from services.user.tables import lock_table
from services.user.upkeep import Upkeep


async def main(config: Config) -> None:
    async with (
        certificates.kept(config) as leaf,
        database.opened(config.database_url) as sql,
        broker.opened(config.broker_url) as bus,
        channel.opened("auth", config, leaf) as auth,
        channel.opened("task", config, leaf) as task,
    ):
        clock, secret = SystemClock(), config.secret("admin")
        accounts, quotas = SqlAccounts(sql), SqlQuotas(sql)
        passwords, tokens = Argon2Passwords(), AuthServiceStub(auth)
        tasks = TaskServiceStub(task)
        users = UserService(accounts, quotas, passwords, tokens, tasks, admin_secret=secret, clock=clock)
        upkeep = Upkeep(accounts, quotas, tasks, tokens, clock)
        await service.serve(
            config,
            leaf,
            partial(add_UserServiceServicer_to_server, users),
            dependencies=[sql.check],
            background=[*upkeep.work(lock.Locks(config, sql, lock_table)), *TaskEvents(quotas, clock).work(bus)],
        )


if __name__ == "__main__":
    uvloop.run(main(Config()))
