"""What the media service and its workers ask of storage. Bytes go over its HTTP listener."""

from __future__ import annotations

import asyncio
import random
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import unquote

import aiohttp
from atelier.storage.v1 import storage_pb2, storage_pb2_grpc
from google.protobuf import json_format
from google.rpc import status_pb2

from mesh import channel, status
from mesh.capability import CAPABILITY_KEY
from mesh.errors import Aborted, Internal, MeshError, Unavailable
from services.media.domain import NoRoom, StorageUnavailable, Written, name_ending
from services.media.renders import Original

CHUNK_BYTES = 1024 * 1024
PAUSES_SECONDS = (0.2, 0.5, 1.0, 2.0)  # between rounds over the instances: a restart of storage goes unnoticed
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=2.0, sock_read=30.0)  # the lease bounds the whole

T = TypeVar("T")


class Endpoints(Protocol):
    """The instances that answer now; `mesh.discovery.Endpoints` is one."""

    def addresses(self) -> list[str]: ...


class Storage:
    """Reads inputs and writes results; any instance will do."""

    def __init__(self, endpoints: Endpoints, client: aiohttp.ClientSession) -> None:
        self._endpoints = endpoints
        self._client = client

    def present(self) -> bool:
        """Tell whether any instance answers, as far as is known here."""
        return bool(self._endpoints.addresses())

    async def read_input(self, file_id: str, capability: str, path: Path) -> str:
        """Copy an input to `path` and return its name, empty when there is none.

        Raises:
            StorageUnavailable: no instance gave it.
            MeshError: what storage refused it with.
        """
        return await self._copied(f"/internal/v1/inputs/{file_id}", self._headers(capability), path)

    async def read_file(self, file_id: str, path: Path) -> None:
        """Copy a file of the present request's user to `path`.

        Raises:
            StorageUnavailable: no instance gave it.
            MeshError: what storage refused it with.
        """
        await self._copied(f"/api/v1/files/{file_id}/content", dict(channel.outgoing_metadata()), path)

    async def write_result(
        self, index: int, name: str, written: Written, capability: str, made_of: Mapping[str, str]
    ) -> str:
        """Store an attempt's result number `index`, from 0, and return its id. Repeating it answers the same file.

        `made_of` says what work it is of: storage's parameters `work` and `count`.

        Raises:
            StorageUnavailable: no instance took it.
            NoRoom: none had room for it.
            MeshError: what storage refused it with.
        """
        size_bytes, content = await asyncio.to_thread(_small, written.path)
        headers = self._headers(capability) | {
            "content-type": written.format.content_type,
            "content-length": str(size_bytes),
        }
        parameters = {"name": name, "index": str(index), "name_ending": name_ending(written), **made_of}

        async def write(base: str) -> str:
            async with self._client.post(
                f"{base}/internal/v1/results",
                params=parameters,
                headers=headers,
                data=_chunks(written.path) if content is None else content,
            ) as response:
                await _require_success(response)
                return str((await response.json())["fileId"])

        return await self._somewhere(write)

    async def _copied(self, target: str, headers: Mapping[str, str], path: Path) -> str:
        async def read(base: str) -> str:
            async with self._client.get(base + target, headers=headers) as response:
                await _require_success(response)
                with path.open("wb") as file:
                    async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                        await asyncio.to_thread(file.write, chunk)
                return _name(response.headers.get("content-disposition", ""))

        return await self._somewhere(read)

    async def _somewhere(self, attempt: Callable[[str], Awaitable[T]]) -> T:
        failure: Unavailable = StorageUnavailable("The files could not be reached.")
        for pause_seconds in (*PAUSES_SECONDS, None):
            for address in _shuffled(self._endpoints.addresses()):
                try:
                    return await attempt(f"https://{address}")
                except NoRoom as refusal:
                    failure = refusal
                except (aiohttp.ClientError, TimeoutError, Unavailable):
                    continue
            if pause_seconds is not None:
                await asyncio.sleep(pause_seconds)
        raise failure

    def _headers(self, capability: str) -> dict[str, str]:
        return dict(channel.outgoing_metadata()) | {CAPABILITY_KEY: capability}


class MeshOriginals:
    """Satisfies `renders.Originals`."""

    def __init__(self, files: storage_pb2_grpc.StorageServiceAsyncStub, contents: Storage) -> None:
        self._files = files
        self.read = contents.read_file

    async def get(self, file_id: str) -> Original:
        found = await self._files.GetFile(storage_pb2.GetFileRequest(file_id=file_id))
        return Original(found.file_id, found.sha256, found.content_type, found.size_bytes)

    async def kept(self, contents: Collection[str]) -> Collection[str]:
        request = storage_pb2.FilterContentsRequest(sha256s=contents)
        return set((await self._files.FilterContents(request)).sha256s)


@asynccontextmanager
async def opened(endpoints: Endpoints, tls: ssl.SSLContext) -> AsyncIterator[Storage]:
    """Hold the connections to storage.

    Args:
        endpoints: its instances.
        tls: shows who we are, and checks that it is storage.
    """
    connector = aiohttp.TCPConnector(ssl=tls)
    # Photographs come in few pieces: httpx, which takes 64 KiB at a time, needs twice the processor time for them.
    async with aiohttp.ClientSession(connector=connector, timeout=TIMEOUT, read_bufsize=CHUNK_BYTES) as client:
        yield Storage(endpoints, client)


async def _require_success(response: aiohttp.ClientResponse) -> None:
    if response.ok:
        return
    refusal = _refusal(response.status, await response.read())
    if refusal.reason == NoRoom.reason:
        raise NoRoom(refusal.message, retry_after_seconds=refusal.retry_after_seconds)
    if response.status >= 500 or isinstance(refusal, Aborted):  # UPLOAD_UNDONE: to be sent again
        raise Unavailable(f"Storage answered {response.status}.")
    raise refusal


def _refusal(code: int, body: bytes) -> MeshError:
    try:
        return status.from_status(json_format.Parse(body, status_pb2.Status(), ignore_unknown_fields=True))
    except (UnicodeDecodeError, json_format.ParseError):
        return Internal(f"Storage answered {code} in a way that makes no sense.")


def _small(path: Path) -> tuple[int, bytes | None]:
    """Return how long a file is, in bytes, and its content if that is one chunk: most results are."""
    size_bytes = path.stat().st_size
    return size_bytes, path.read_bytes() if size_bytes <= CHUNK_BYTES else None


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk


def _name(disposition: str) -> str:
    found = re.search(r"filename\*=UTF-8''([^;\s]+)", disposition)  # RFC 8187; storage always gives it
    return unquote(found[1]) if found else ""


def _shuffled(addresses: Sequence[str]) -> list[str]:
    return random.sample(addresses, len(addresses))
