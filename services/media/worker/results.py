"""The same work once: whether the results of an attempt were made before, or are being made by somebody."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from atelier.storage.v1 import storage_pb2, storage_pb2_grpc
from google.protobuf import json_format

from mesh.errors import Aborted, DeadlineExceeded, Internal, MeshError, Unavailable, Unimplemented

ASK_AGAIN_SECONDS = 0.25
WAIT_SECONDS = 60.0  # for another's results; an operation may take no longer, so then it is made here, too
HOLD_SHARE = 0.3  # of a lease: two calls may fail before it lapses

log = logging.getLogger(__name__)


class Results:
    """What storage knows of equal work."""

    def __init__(self, storage: storage_pb2_grpc.StorageServiceAsyncStub, wait_seconds: float = WAIT_SECONDS) -> None:
        self._storage = storage
        self._wait_seconds = wait_seconds

    @asynccontextmanager
    async def taken(self, work: storage_pb2.Work, capability: str) -> AsyncIterator[list[str]]:
        """Hold the ids of the results of equal work; none when they are to be made here, for others wait meanwhile.

        Raises:
            MeshError: storage's refusal. Where it cannot be asked the work is done, perhaps twice.
        """
        request = storage_pb2.TakeResultsRequest(capability=capability, work=work)
        answer = await self._answer(request)
        if answer.files or not answer.HasField("lease_duration"):
            yield [file.file_id for file in answer.files]
            return
        pause_seconds = HOLD_SHARE * answer.lease_duration.ToTimedelta().total_seconds()
        holding = asyncio.create_task(self._hold(request, pause_seconds))
        try:
            yield []
        finally:
            holding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await holding

    async def _answer(self, request: storage_pb2.TakeResultsRequest) -> storage_pb2.TakeResultsResponse:
        until = time.monotonic() + self._wait_seconds
        while True:
            try:
                answer = await self._storage.TakeResults(request)
            except (Unavailable, Aborted, DeadlineExceeded, Unimplemented, Internal) as failure:
                log.info("nobody knows whether this was made before", extra={"failure": repr(failure)})
                return storage_pb2.TakeResultsResponse()
            if not answer.wait or time.monotonic() >= until:
                return answer
            await asyncio.sleep(ASK_AGAIN_SECONDS)

    async def _hold(self, request: storage_pb2.TakeResultsRequest, pause_seconds: float) -> None:
        while True:
            await asyncio.sleep(pause_seconds)
            with contextlib.suppress(MeshError):
                await self._storage.TakeResults(request)


def work_json(work: storage_pb2.Work) -> str:
    return json_format.MessageToJson(work, indent=None)
