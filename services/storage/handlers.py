"""atelier.storage.v1.StorageService, but for the rpcs that carry bytes: those are in `http`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NoReturn

from atelier.storage.v1 import storage_pb2 as pb
from atelier.storage.v1 import storage_pb2_grpc

from mesh import capability, context, paging, urls
from mesh.clock import Clock
from mesh.errors import Unimplemented
from mesh.wire import duration, timestamp
from services.storage.convert import file_to_proto, origin_from
from services.storage.domain import Files, Turn
from services.storage.keeping import MAKING_SECONDS, Keeping

URL_LIFETIME = timedelta(hours=1)  # a page that stays open longer asks again


class ServedOverHttp(Unimplemented):
    reason = "SERVED_OVER_HTTP"


class StorageService(storage_pb2_grpc.StorageServiceServicer):
    """Raises MeshError only; the mesh turns it into a status."""

    def __init__(self, files: Files, keeping: Keeping, capability_key: str, url_key: str, clock: Clock) -> None:
        self._url_key = url_key
        self._clock = clock
        self._files = files
        self._keeping = keeping
        self._capability_key = capability_key

    async def ListFiles(self, request: pb.ListFilesRequest, _: object) -> pb.ListFilesResponse:
        size = request.page_size or paging.DEFAULT_PAGE_SIZE
        before = str(paging.decode(request.page_token, [str])[0]) if request.page_token else None
        # One more than asked for tells whether there is a page after this one.
        found = await self._files.page(context.user().user_id, size + 1, before)
        page = found[:size]
        return pb.ListFilesResponse(
            files=[file_to_proto(file) for file in page],
            next_page_token=paging.encode([page[-1].file_id]) if len(found) > size else "",
        )

    async def GetFile(self, request: pb.GetFileRequest, _: object) -> pb.File:
        return file_to_proto(await self._files.get(context.user().user_id, request.file_id))

    async def SignFileUrl(self, request: pb.SignFileUrlRequest, _: object) -> pb.SignedUrl:
        user_id, wanted = context.user().user_id, request.lifetime_duration
        file = await self._files.get(user_id, request.file_id)
        lifetime = wanted.ToTimedelta() if request.HasField("lifetime_duration") else URL_LIFETIME
        expire_time = self._clock.now() + lifetime
        target = f"/api/v1/files/{file.file_id}/content"
        if request.HasField("render"):
            target = f"/api/v1/files/{file.file_id}/render" + (f"?{request.render}" if request.render else "")
        return pb.SignedUrl(
            url=urls.signed(self._url_key, user_id, target, expire_time), expire_time=timestamp(expire_time)
        )

    async def DeleteFile(self, request: pb.DeleteFileRequest, _: object) -> pb.DeleteFileResponse:
        await self._keeping.delete(context.user().user_id, request.file_id, context.request_id())
        return pb.DeleteFileResponse()

    async def GetUsage(self, _request: pb.GetUsageRequest, _: object) -> pb.Usage:
        usage = await self._files.usage(context.user().user_id)
        return pb.Usage(file_count=usage.file_count, size_bytes=usage.size_bytes)

    async def StatFile(self, request: pb.StatFileRequest, _: object) -> pb.File:
        return file_to_proto(await self._keeping.usable(request.user_id, request.file_id))

    async def StatFiles(self, request: pb.StatFilesRequest, _: object) -> pb.StatFilesResponse:
        files = await self._files.some(request.user_id, request.file_ids)
        return pb.StatFilesResponse(files=map(file_to_proto, files))

    async def FilterContents(self, request: pb.FilterContentsRequest, _: object) -> pb.FilterContentsResponse:
        return pb.FilterContentsResponse(sha256s=await self._files.used(request.sha256s))

    async def TakeResults(self, request: pb.TakeResultsRequest, _: object) -> pb.TakeResultsResponse:
        granted = capability.verify(self._capability_key, request.capability)
        work = await self._keeping.work(granted, origin_from(request.work), request.work.input_file_ids[1:])
        turn, files = await self._keeping.take(work, granted.max_bytes)
        return pb.TakeResultsResponse(
            files=[file_to_proto(file) for file in files],
            wait=turn is Turn.WAIT,
            lease_duration=duration(timedelta(seconds=MAKING_SECONDS)) if turn is Turn.MAKE else None,
        )

    async def DiscardResult(self, request: pb.DiscardResultRequest, _: object) -> pb.DiscardResultResponse:
        granted = capability.verify(self._capability_key, request.capability)
        await self._keeping.discard(granted.task_id, granted.attempt)
        return pb.DiscardResultResponse()

    async def _served_over_http(self, *_: Any, **__: Any) -> NoReturn:
        raise ServedOverHttp("Calls that carry files are made over HTTP, at the same edge.")

    UploadFile = GetFileContent = ReadInput = WriteResult = _served_over_http
