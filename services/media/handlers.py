"""atelier.media.v1.MediaService: what the installation can do, as the contract says it."""

from __future__ import annotations

from atelier.media.v1 import media_pb2 as pb
from atelier.media.v1 import media_pb2_grpc

from services.media.convert import Comments, descriptions


class MediaService(media_pb2_grpc.MediaServiceServicer):
    """Reads nothing but the contract; the work is done by `services.media.worker`."""

    def __init__(self, said: Comments) -> None:
        self._operations = pb.ListOperationsResponse(operations=descriptions(said))

    async def ListOperations(self, _request: pb.ListOperationsRequest, _: object) -> pb.ListOperationsResponse:
        return self._operations
