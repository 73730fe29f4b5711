"""Runs a media worker: `python -m services.media.worker`. Wiring only."""

from functools import partial

import uvloop
from atelier.storage.v1.storage_pb2_grpc import StorageServiceStub
from atelier.task.v1.task_pb2_grpc import TaskServiceStub

from mesh import broker, certificates, channel, discovery, service
from services.media import peers, processes
from services.media.config import WorkerConfig
from services.media.worker import weights
from services.media.worker.capacity import capacity, pools
from services.media.worker.tasks import Worker


async def main(config: WorkerConfig) -> None:
    models = weights.described(config.weights_dir)
    async with (
        certificates.kept(config) as leaf,
        broker.opened(config.broker_url) as bus,
        channel.opened("task", config, leaf) as tasks,
        channel.opened("storage", config, leaf) as results,
        discovery.followed("storage-http", config) as endpoints,
        peers.opened(endpoints, leaf.tls_client("storage")) as files,
        processes.opened(config) as slots,
    ):
        worker = Worker(
            TaskServiceStub(tasks),
            StorageServiceStub(results),
            files,
            slots,
            pools=pools(config, models),
            models=models,
            face_detector=await processes.face_detector(),
            fonts=processes.fonts(),
            worker_id=config.instance,
            drain_seconds=config.drain_seconds,
        )
        await service.serve(
            config,
            leaf,
            dependencies=[bus.check],
            background=[partial(worker.run, bus)],
            capacity=capacity(config, models),
        )


if __name__ == "__main__":
    uvloop.run(main(WorkerConfig()))
