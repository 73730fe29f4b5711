"""Runs the storage service: `python -m services.storage`. Wiring only."""

from functools import partial

import uvloop
from atelier.storage.v1.storage_pb2_grpc import add_StorageServiceServicer_to_server
from atelier.task.v1.task_pb2_grpc import TaskServiceStub
from atelier.user.v1.user_pb2_grpc import UserServiceStub

from mesh import broker, certificates, channel, contract, database, lock, service, urls
from mesh.clock import SystemClock
from services.storage.blobs import FolderBlobs
from services.storage.config import Config
from services.storage.consumers import TaskEvents
from services.storage.handlers import StorageService
from services.storage.http import UPLOAD, BytesEndpoints
from services.storage.keeping import Keeping
from services.storage.peers import MeshQuota, MeshTasks
from services.storage.repository import SqlFiles
from services.storage.tables import lock_table
from services.storage.upkeep import Upkeep


async def main(config: Config) -> None:
    async with (
        certificates.kept(config) as leaf,
        database.opened(config.database_url) as sql,
        broker.opened(config.broker_url) as bus,
        channel.opened("user", config, leaf) as user,
        channel.opened("task", config, leaf) as task,
    ):
        files, blobs, key = SqlFiles(sql), FolderBlobs(config.blobs_dir), config.secret("capability.key")
        keeping = Keeping(files, blobs, MeshQuota(UserServiceStub(user)), MeshTasks(TaskServiceStub(task)))
        upkeep = Upkeep(files, blobs, keeping, sweep_seconds=config.sweep_seconds, grace_seconds=config.grace_seconds)
        locks = lock.Locks(config, sql, lock_table)
        servicer = StorageService(files, keeping, key, config.secret(urls.KEY), SystemClock())
        limit_bytes = contract.installed().methods[UPLOAD].max_request_bytes  # the edge's, too
        await service.serve(
            config,
            leaf,
            partial(add_StorageServiceServicer_to_server, servicer),
            http=BytesEndpoints(files, blobs, keeping, key, limit_bytes).by_rpc(),
            dependencies=[sql.check],  # not the broker: without it results are confirmed by asking the task service
            background=[*upkeep.work(locks), *TaskEvents(files).work(bus)],
        )


if __name__ == "__main__":
    uvloop.run(main(Config()))
