"""Runs the task service: `python -m services.task`. Wiring only."""

from functools import partial

import uvloop
from atelier.storage.v1.storage_pb2_grpc import StorageServiceStub
from atelier.task.v1.task_pb2_grpc import add_TaskServiceServicer_to_server
from atelier.task.v1.webhook_pb2_grpc import add_WebhookServiceServicer_to_server
from atelier.user.v1.user_pb2_grpc import UserServiceStub

from mesh import broker, certificates, channel, database, lock, outbox, service
from mesh.clock import SystemClock
from services.task import convert, handlers, repository, sender, tables, upkeep, watch, webhook_repository
from services.task.config import Config


async def main(config: Config) -> None:
    async with (
        certificates.kept(config) as leaf,
        database.opened(config.database_url) as sql,
        broker.opened(config.broker_url) as bus,
        channel.opened("storage", config, leaf) as storage,
        channel.opened("user", config, leaf) as user,
        sender.posting(config.webhook_allowed_networks) as posts,
    ):
        out, clock = outbox.Outbox(sql, tables.outbox_table), SystemClock()
        tasks = repository.SqlTasks(sql, out, convert.message_of, convert.hook_body)
        watches = watch.Watches(tasks, clock)
        tasks.after_commit(watches.changed)
        peers, key = (StorageServiceStub(storage), UserServiceStub(user)), config.secret("capability.key")
        keeper = upkeep.Upkeep(tasks, bus, config.terms)
        work = keeper.work(lock.Locks(config, sql, tables.lock_table))
        owed = webhook_repository.SqlWebhooks(sql)
        hooks = handlers.WebhookService(owed, config.webhook_allowed_networks)
        servicer = handlers.TaskService(
            tasks, watches, *peers, hooks, capability_key=key, terms=config.terms,
            is_unserved=keeper.is_unserved, clock=clock,
        )  # fmt: skip
        await service.serve(
            config,
            leaf,
            partial(add_TaskServiceServicer_to_server, servicer),
            partial(add_WebhookServiceServicer_to_server, hooks),
            dependencies=[sql.check],  # not the broker: without it tasks are taken, and go out later
            background=[partial(out.relay, bus), *watches.work(bus), *work, sender.Sender(owed, posts, clock).run],
            degraded=keeper.degraded,
        )


if __name__ == "__main__":
    uvloop.run(main(Config()))
