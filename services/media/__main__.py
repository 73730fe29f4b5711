"""Runs the media service: `python -m services.media`. Wiring only."""

import asyncio
from functools import partial

import uvloop
from atelier.media.v1 import media_pb2
from atelier.media.v1.media_pb2_grpc import add_MediaServiceServicer_to_server
from atelier.storage.v1.storage_pb2_grpc import StorageServiceStub

from mesh import certificates, channel, contract, discovery, service
from services.media import peers, processes
from services.media.cache import FolderCache
from services.media.config import Config
from services.media.convert import comments
from services.media.handlers import MediaService
from services.media.http import RenderEndpoint
from services.media.renders import FORGET_SECONDS, Renders


async def main(config: Config) -> None:
    said = comments(contract.IMAGE.read_bytes(), media_pb2.DESCRIPTOR.name)
    cache = await asyncio.to_thread(FolderCache, config.data_dir / "renders" / config.instance, config.cache_bytes)
    async with (
        certificates.kept(config) as leaf,
        channel.opened("storage", config, leaf) as files,
        discovery.followed("storage-http", config) as endpoints,
        peers.opened(endpoints, leaf.tls_client("storage")) as contents,
        processes.opened(config) as slots,
    ):
        originals = peers.MeshOriginals(StorageServiceStub(files), contents)
        renders = Renders(originals, slots, cache, at_once=config.renders_at_once)
        await service.serve(
            config,
            leaf,
            partial(add_MediaServiceServicer_to_server, MediaService(said)),
            http=RenderEndpoint(originals, renders).by_rpc(),
            background=[service.every(FORGET_SECONDS, renders.forget_deleted)],
        )


if __name__ == "__main__":
    uvloop.run(main(Config()))
