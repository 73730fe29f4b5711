"""Renders on disk, within a bound: those that were asked for last stay.

A name says of what something is and what it is: `<SHA-256 of the original>-<key>`. It appears whole, by a rename, and
when it was asked for last is its time of modification, so that a restart forgets nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from pathlib import Path

CHUNK_BYTES = 256 * 1024  # one thread hop moves this much

log = logging.getLogger(__name__)


class Rendering:
    """An open file, readable by many at a time though its name may be gone; closed when the last of them is done."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self.size_bytes = os.fstat(self._descriptor).st_size

    def head(self) -> bytes:
        """Return its beginning; all of it when it is small."""
        return os.pread(self._descriptor, CHUNK_BYTES, 0)

    async def rest(self, head: bytes) -> AsyncIterator[bytes]:
        """Yield `head`, and what follows it."""
        at, chunk = 0, head
        while chunk:
            yield chunk
            at += len(chunk)
            chunk = await asyncio.to_thread(os.pread, self._descriptor, CHUNK_BYTES, at)


class FolderCache:
    """A folder of one process. Reads what an earlier life left there."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # people's pictures are nobody else's to see
        found = sorted((entry.stat().st_mtime_ns, entry.name, entry.stat().st_size) for entry in os.scandir(folder))
        self._sizes = OrderedDict((name, size_bytes) for _, name, size_bytes in found)
        """In the order in which they were asked for last."""
        self._bytes = sum(self._sizes.values())
        self._evict(limit_bytes)

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def sources(self) -> set[str]:
        """Return the SHA-256 of every original of which something is here."""
        return {name.partition("-")[0] for name in self._sizes}

    async def opened(self, name: str) -> Rendering | None:
        """Open one; None when it is not there any more."""
        self._sizes.move_to_end(name)
        try:
            return await asyncio.to_thread(_asked_for, self._folder / name)
        except OSError:  # somebody tidied up, or the disk fails
            self._remove(name)
            return None

    async def keep(self, name: str, made: Path) -> Rendering:
        """Take the file `made`, and open it. What cannot be kept can be read all the same."""
        rendering = await asyncio.to_thread(Rendering, made)
        if rendering.size_bytes > self._limit_bytes:
            return rendering
        try:
            await asyncio.to_thread(_on_disk, made)
            self._take(name, made, rendering.size_bytes)
        except OSError as error:
            log.warning("a render could not be kept", extra={"failure": repr(error)})
        return rendering

    async def leave_free(self, wanted_bytes: int) -> None:
        """Give room back to a disk that has less than `wanted_bytes` left."""
        missing_bytes = wanted_bytes - (await asyncio.to_thread(shutil.disk_usage, self._folder)).free
        if missing_bytes > 0:
            self._evict(max(0, self._bytes - missing_bytes))

    def forget(self, sources: Iterable[str]) -> None:
        """Remove whatever was made of these originals, by their SHA-256."""
        gone = set(sources)
        for name in [name for name in self._sizes if name.partition("-")[0] in gone]:
            self._remove(name)

    def _take(self, name: str, made: Path, size_bytes: int) -> None:
        made.replace(self._folder / name)  # in a thread it would be done uncounted when the caller is cancelled
        self._bytes += size_bytes - self._sizes.pop(name, 0)
        self._sizes[name] = size_bytes
        self._evict(self._limit_bytes)

    def _evict(self, limit_bytes: int) -> None:
        while self._bytes > limit_bytes:
            self._remove(next(iter(self._sizes)))

    def _remove(self, name: str) -> None:
        self._bytes -= self._sizes.pop(name, 0)
        with suppress(OSError):  # microseconds, and in a thread it could remove the next one of the same name
            (self._folder / name).unlink()


def _asked_for(path: Path) -> Rendering:
    os.utime(path)
    return Rendering(path)


def _on_disk(made: Path) -> None:
    with made.open("rb") as file:
        os.fsync(file.fileno())  # or a machine that loses its power might find a name without its bytes
