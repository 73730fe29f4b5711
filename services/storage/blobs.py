"""Bytes in a local folder, which all replicas of one machine share.

`ab/cdef…` holds the content whose SHA-256 is `abcdef…`; `incoming/` holds what is arriving or on its way
out. Both lie in one filesystem, so a content appears and disappears by one rename. Disk work runs in threads.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from services.storage.domain import HEAD_BYTES, FileNotFound, Incoming, StorageFull, require_size

CHUNK_BYTES = 256 * 1024  # one thread hop writes this much: large enough to be cheap, small enough for many at once
READ_BYTES = 1024 * 1024  # one hop reads this much, which is all that a download has in memory
_PREFIX_LENGTH = 2


class FolderBlobs:
    """Satisfies `domain.Blobs`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._incoming = folder / "incoming"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # people's files are nobody else's to read
        self._incoming.mkdir(exist_ok=True)

    @asynccontextmanager
    async def received(self, chunks: AsyncIterator[bytes], limit_bytes: int) -> AsyncIterator[Incoming]:
        # On the event loop on purpose, as in `remove`: in a thread it could outlive a cancelled caller, and then nobody
        # would discard it.
        with _disk_errors_told():
            part = _Part(self._incoming / uuid.uuid4().hex)
        try:
            buffer = bytearray()
            async for chunk in chunks:
                buffer += chunk
                require_size(part.size_bytes + len(buffer), limit_bytes)
                if len(buffer) >= CHUNK_BYTES:
                    await part.write(bytes(buffer))
                    buffer.clear()
            await part.write(bytes(buffer))
            yield part
        finally:
            # A thread that still writes for a cancelled caller fails on the closed file, nothing else. Shielded: a
            # deadline that comes only now must not leave the bytes behind.
            if not part.kept:
                await asyncio.shield(asyncio.to_thread(part.discard))

    async def keep(self, incoming: Incoming) -> None:
        if not isinstance(incoming, _Part):
            raise TypeError("not received here")
        with _disk_errors_told():
            await asyncio.to_thread(incoming.move, self._path(incoming.sha256))

    async def read(self, sha256: str, start: int, stop: int) -> AsyncGenerator[bytes]:
        try:
            source = await asyncio.to_thread(self._path(sha256).open, "rb")
        except FileNotFoundError:  # deleted since its row was read
            raise FileNotFound("There is no such file any more.", metadata={"sha256": sha256}) from None
        return _read(source, start, stop)

    async def remove(self, sha256: str) -> None:
        # The rename is on the event loop on purpose: it takes microseconds, and in a thread it could outlive a
        # cancelled caller and the transaction that makes it right. Freeing the space may take its time.
        leaving = self._incoming / uuid.uuid4().hex
        with suppress(FileNotFoundError):
            self._path(sha256).rename(leaving)
            await asyncio.to_thread(leaving.unlink, missing_ok=True)

    async def remove_leftovers(self, grace_seconds: float) -> None:
        await asyncio.to_thread(_remove_older, self._incoming, grace_seconds)

    async def older_than(self, grace_seconds: float) -> AsyncIterator[tuple[str, Sequence[str]]]:
        for number in range(256):
            prefix = f"{number:02x}"
            names = await asyncio.to_thread(_older, self._folder / prefix, grace_seconds)
            if names:
                yield prefix, [prefix + name for name in names]

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:_PREFIX_LENGTH] / sha256[_PREFIX_LENGTH:]


class _Part:
    """A file that grows chunk by chunk. Its methods but `write` belong into a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self.size_bytes = 0
        self.head = b""
        self.kept = False

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    async def write(self, data: bytes) -> None:
        with _disk_errors_told():
            await asyncio.to_thread(self._write, data)
        self.size_bytes += len(data)
        self.head = (self.head + data[:HEAD_BYTES])[:HEAD_BYTES]

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def move(self, target: Path) -> None:
        """Put the bytes where they stay; over equal ones if they are there already."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if not target.parent.exists():
            target.parent.mkdir(exist_ok=True)
            _sync_folder(target.parent.parent)
        self._path.replace(target)
        _sync_folder(target.parent)
        self.kept = True

    def discard(self) -> None:
        with suppress(OSError):  # a full disk fails the flush once more; the bytes are not wanted any more
            self._file.close()
        self._path.unlink(missing_ok=True)


@contextmanager
def _disk_errors_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:  # the disk's, the account's, the process's end
            raise
        raise StorageFull(
            "There is no room for more files at present; try again later.",
            metadata={"errno": errno.errorcode[error.errno]},
            retry_after_seconds=60,  # people must make room: sooner is only noise
        ) from error


async def _read(source: BinaryIO, start: int, stop: int) -> AsyncGenerator[bytes]:
    with source:
        source.seek(start)
        while start < stop:
            chunk = await asyncio.to_thread(source.read, min(READ_BYTES, stop - start))
            if not chunk:
                raise EOFError(f"{source.name} is shorter than its row says")
            start += len(chunk)
            yield chunk


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _older(folder: Path, grace_seconds: float) -> list[str]:
    # The filesystem's times are compared with the same machine's clock: the folder is local.
    before = time.time() - grace_seconds
    names = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # gone since it was listed
                if entry.stat().st_mtime < before:
                    names.append(entry.name)
    return names


def _remove_older(folder: Path, grace_seconds: float) -> None:
    for name in _older(folder, grace_seconds):
        (folder / name).unlink(missing_ok=True)
