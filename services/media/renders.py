"""Small versions of images, made when they are asked for: each once, as many at a time as there are slots.

Whoever asks has been found to own the original before; nothing here knows of people.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from mesh.errors import InvalidArgument, ResourceExhausted
from services.media.cache import FolderCache, Rendering
from services.media.domain import Fit, Format, Resize, canonical, full_disks_told, work_key
from services.media.processes import ENCODER, Slot

MAX_SIDE_PX = 4096  # as the contract's bounds; also of a side that follows from the other
MAX_INPUT_BYTES = 64 * 1024 * 1024  # as an upload's; larger results of tasks are for tasks
WAIT_SECONDS = 5.0  # for a slot: a page that waits longer is better told to come again
RETRY_AFTER_SECONDS = 1.0
RESULT_BYTES = 64 * 1024 * 1024  # as much as a PNG of the largest sides may take
FORGET_SECONDS = 30.0  # between two looks for what was made of files that are gone; nobody is shown it meanwhile
FORGET_AT_ONCE = 1000  # originals that storage is asked about in one call

log = logging.getLogger(__name__)


class RenderBusy(ResourceExhausted):
    reason = "RENDER_BUSY"


class InputTooLarge(InvalidArgument):
    reason = "INPUT_TOO_LARGE"


@dataclass(frozen=True, slots=True)
class Original:
    """A file of the user who asks."""

    file_id: str
    sha256: str
    content_type: str
    size_bytes: int


class Originals(Protocol):
    """People's files, for the present request's user."""

    async def get(self, file_id: str) -> Original:
        """Return a file of theirs. Raises what storage refuses it with, as when it is another's."""

    async def read(self, file_id: str, path: Path) -> None:
        """Copy its bytes to `path`."""

    async def kept(self, contents: Collection[str]) -> Collection[str]:
        """Return which of these SHA-256 somebody's file still has."""


@dataclass(frozen=True, slots=True)
class Render:
    """What is wanted of an original; `key` is equal for equal bytes."""

    original: Original
    operation: Resize
    key: str

    @classmethod
    def of(cls, original: Original, wanted: Resize, preferred: Format | None) -> Render:
        """Return what a request means.

        Args:
            original: of which.
            wanted: as asked for; sides and format may be missing.
            preferred: the format where `wanted` says none; None for the original's own.

        Raises:
            InputTooLarge: the original has too many bytes.
        """
        if original.size_bytes > MAX_INPUT_BYTES:
            raise InputTooLarge(
                f"The file has {original.size_bytes} bytes; at most {MAX_INPUT_BYTES} are rendered. Make it a task.",
                metadata={"size_bytes": str(original.size_bytes), "max": str(MAX_INPUT_BYTES)},
            )
        own = next((each for each in Format if each.content_type == original.content_type), Format.PNG)
        both = wanted.width is not None and wanted.height is not None
        operation = replace(
            wanted,
            width=wanted.width or MAX_SIDE_PX,
            height=wanted.height or MAX_SIDE_PX,
            # Only a box can be filled; towards one side it means the same as to fit.
            fit=Fit.FIT if wanted.fit is Fit.FILL and not both else wanted.fit,
            format=wanted.format or preferred or own,
            still=True,
        )
        return cls(original, operation, work_key(original.sha256, canonical(operation, {}), ENCODER))

    @property
    def format(self) -> Format:
        return self.operation.format or Format.PNG

    @property
    def name(self) -> str:
        return f"{self.original.sha256}-{self.key}"


@dataclass(slots=True)
class _Flight:
    making: asyncio.Task[Rendering]
    waiting: int = 0


class Renders:
    """Makes and keeps renders.

    Args:
        originals: where their bytes come from.
        slots: where the work is done.
        cache: where they are kept.
        at_once: different ones that may be under way or wait for a slot.
        wait_seconds: for a slot.
    """

    def __init__(
        self,
        originals: Originals,
        slots: Sequence[Slot],
        cache: FolderCache,
        *,
        at_once: int,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        self._originals = originals
        self._cache = cache
        self._at_once = at_once
        self._wait_seconds = wait_seconds
        self._flights: dict[tuple[str, str], _Flight] = {}
        self._free: asyncio.Queue[Slot] = asyncio.Queue()
        for slot in slots:
            self._free.put_nowait(slot)

    async def opened(self, render: Render) -> Rendering:
        """Open a render, made now if need be. It is given up when nobody waits for it any more.

        Raises:
            RenderBusy: too much is asked for at present.
            MeshError: the operation's refusal, or storage's.
        """
        while render.name in self._cache:
            found = await self._cache.opened(render.name)
            if found is not None:
                return found
        # By the file, too: what ends one owner's reading must not end another's.
        key = (render.original.file_id, render.key)
        flight = self._flights.get(key)
        if flight is None:
            if len(self._flights) >= self._at_once:
                raise _busy()
            flight = self._flights[key] = _Flight(asyncio.create_task(self._made(render)))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.making)
        finally:
            flight.waiting -= 1
            if not flight.waiting:
                flight.making.cancel()
                self._flights.pop(key, None)

    async def forget_deleted(self) -> None:
        """Remove what was made of contents that no file has any more."""
        sources = sorted(self._cache.sources())
        for at in range(0, len(sources), FORGET_AT_ONCE):
            some = sources[at : at + FORGET_AT_ONCE]
            self._cache.forget(set(some) - set(await self._originals.kept(some)))

    async def _made(self, render: Render) -> Rendering:
        try:
            async with asyncio.timeout(self._wait_seconds):
                slot = await self._free.get()
        except TimeoutError:
            raise _busy() from None
        try:
            with full_disks_told():
                return await self._made_in(slot, render)
        finally:
            await asyncio.shield(self._cleared(slot))

    async def _made_in(self, slot: Slot, render: Render) -> Rendering:
        await self._cache.leave_free(render.original.size_bytes + RESULT_BYTES)
        slot.make_folder()
        source = slot.folder / "input"
        await self._originals.read(render.original.file_id, source)
        written, *_ = await slot.run(render.operation, source, {}, slot.folder, lambda _share: None)
        return await self._cache.keep(render.name, written.path)

    async def _cleared(self, slot: Slot) -> None:
        try:
            await slot.clear()
        finally:
            self._free.put_nowait(slot)


def _busy() -> RenderBusy:
    return RenderBusy(
        "Too many pictures are asked for at the moment; try again.", retry_after_seconds=RETRY_AFTER_SECONDS
    )  # fmt: skip
