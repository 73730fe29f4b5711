"""atelier.media.v1.MediaService, but for the rpc that carries bytes: that is in `http`."""

from __future__ import annotations

from typing import Any, NoReturn

from atelier.media.v1 import media_pb2 as pb
from atelier.media.v1 import media_pb2_grpc

from mesh.errors import Unimplemented
from services.media.convert import Comments, descriptions


class ServedOverHttp(Unimplemented):
    reason = "SERVED_OVER_HTTP"


class MediaService(media_pb2_grpc.MediaServiceServicer):
    """Reads nothing but the contract; the work is done by `services.media.worker`."""

    def __init__(self, said: Comments) -> None:
        self._operations = pb.ListOperationsResponse(operations=descriptions(said))

    async def ListOperations(self, _request: pb.ListOperationsRequest, _: object) -> pb.ListOperationsResponse:
        return self._operations

    async def RenderFile(self, *_: Any, **__: Any) -> NoReturn:
        raise ServedOverHttp("Calls that carry files are made over HTTP, at the same edge.")
