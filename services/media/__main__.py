"""Runs the media service: `python -m services.media`. Wiring only."""

from functools import partial

import uvloop
from atelier.media.v1 import media_pb2
from atelier.media.v1.media_pb2_grpc import add_MediaServiceServicer_to_server

from mesh import certificates, contract, service
from services.media.config import Config
from services.media.convert import comments
from services.media.handlers import MediaService


async def main(config: Config) -> None:
    said = comments(contract.IMAGE.read_bytes(), media_pb2.DESCRIPTOR.name)
    async with certificates.kept(config) as leaf:
        await service.serve(config, leaf, partial(add_MediaServiceServicer_to_server, MediaService(said)))


if __name__ == "__main__":
    uvloop.run(main(Config()))
