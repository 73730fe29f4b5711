"""In which order a file comes and goes, so that a crash at any line leaves nothing behind.

Coming: bytes arrive → row, not ready → quota charged → bytes made to last → row ready.
Going: row away and its debt noted, in one transaction → bytes removed, if no row has them → quota given back.

Nobody sees a row before it is ready. What breaks off halfway is put right by `upkeep`: each step is safe to repeat
and to run twice at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from dataclasses import replace

from mesh import crash
from mesh.capability import Capability
from mesh.errors import MeshError
from services.storage.domain import (
    Blobs,
    File,
    FileNotFound,
    Files,
    Incoming,
    NewFile,
    Origin,
    Quota,
    ResultInUse,
    Tasks,
    Turn,
    Verdict,
    Work,
    require_size,
    undone,
    verdict,
    work_key,
)

log = logging.getLogger(__name__)

MAKING_SECONDS = 15.0  # as long as a task's lease: so soon another makes what a killed worker was to make
GIVE_BACK_SECONDS = 2.0  # how long a delete waits for its quota before it leaves that to upkeep


class Keeping:
    """Brings files in and takes them away."""

    def __init__(self, files: Files, blobs: Blobs, quota: Quota, tasks: Tasks) -> None:
        self._files = files
        self._blobs = blobs
        self._quota = quota
        self._tasks = tasks

    async def keep(self, new: NewFile, incoming: Incoming, request_id: str = "") -> File:
        """Store a file whose bytes have arrived, or return what an earlier call of the same kind stored.

        Raises:
            MeshError: the quota's or the disk's refusal, or UploadUndone; nothing is kept then.
        """
        begun = await self._files.begin(new, request_id)
        if begun.ready:
            return begun
        kind = "result" if begun.task_id else "upload"
        crash.point(f"{kind}: begun")
        try:
            await self._quota.charge(begun.file_id, begun.user_id, begun.size_bytes)
            crash.point(f"{kind}: quota charged")
            await self._blobs.keep(incoming)
            crash.point(f"{kind}: bytes kept")
        except MeshError:
            await tried(self.undo(begun))
            raise
        kept = await self._files.finish(begun.file_id)
        if kept is None:
            await tried(self.undo(begun))
            raise undone()
        crash.point(f"{kind}: finished")
        return kept

    async def work(self, granted: Capability, origin: Origin, more_inputs: Sequence[str]) -> Work:
        """Return what an attempt makes, by the contents of its files; `origin` need not know its input's yet.

        Raises:
            CapabilityInvalid: the attempt may not read one of them.
            FileNotFound: one is not there.
        """
        names = [origin.input_file_id, *more_inputs]
        for file_id in names:
            granted.require_input(file_id)
        source, *others = [await self._files.get(granted.user_id, file_id) for file_id in names]
        return Work(
            key=work_key(origin, [source.sha256, *(each.sha256 for each in others)]),
            task_id=granted.task_id,
            attempt=granted.attempt,
            user_id=granted.user_id,
            input_name=source.name,
            origin=replace(origin, input_sha256=source.sha256),
        )

    async def take(self, work: Work, limit_bytes: int) -> tuple[Turn, Sequence[File]]:
        """Store the results of equal work as the asker's own, or say who makes them.

        Raises:
            FileTooLarge: one is larger than the asker may store.
            MeshError: the quota's refusal; nothing is stored then.
        """
        turn, begun = await self._files.take(work, MAKING_SECONDS)
        if begun:
            crash.point("take: begun")
        try:
            for each in begun:
                require_size(each.size_bytes, limit_bytes)
            # The bytes are there: a row that is ready has them, and none removes them while these rows are here.
            return turn, [each if each.ready else await self._charged(each) for each in begun]
        except MeshError:
            for each in begun:
                await tried(self.undo(each))
            raise

    async def _charged(self, begun: File) -> File:
        await self._quota.charge(begun.file_id, begun.user_id, begun.size_bytes)
        crash.point("take: quota charged")
        kept = await self._files.finish(begun.file_id)
        if kept is None:
            raise undone()
        crash.point("take: finished")
        return kept

    async def delete(self, user_id: str, file_id: str, request_id: str) -> None:
        """Take a file away, unless this very request has done so: the mesh repeats one whose answer was lost.

        Raises:
            FileNotFound: there is none of this user.
        """
        taken = await self._files.delete(user_id, file_id, request_id)
        if taken is not None:
            await self._clear(taken)

    async def usable(self, user_id: str, file_id: str) -> File:
        """Return a file that work may be based on: an upload, or a result that its task took.

        Raises:
            FileNotFound: none, another user's, or a result that its task has not taken.
        """
        file = await self._files.get(user_id, file_id)
        # The event may still be on its way when the owner already goes on with the result.
        if file.confirmed or await self._judged(file) is Verdict.TAKEN:
            return file
        raise FileNotFound(f"There is no file {file_id}.", metadata={"file_id": file_id})

    async def discard(self, task_id: str, attempt: int) -> None:
        """Take away what an attempt wrote. Raises ResultInUse when its task took it."""
        results = await self._files.results(task_id, attempt)
        for file in results:
            if file.confirmed or await self._judged(file) is Verdict.TAKEN:
                raise ResultInUse(
                    f"The task took the file {file.file_id}: it cannot be discarded.",
                    metadata={"file_id": file.file_id},
                )
        for file in results:
            await self._refuse(file)
        await self._files.release(task_id, attempt)

    async def settle(self, result: File) -> None:
        """Confirm or refuse a result as its task has; leave it while the task works."""
        if await self._judged(result) is Verdict.REFUSED:
            await self._refuse(result)

    async def undo(self, file: File) -> None:
        """Take away what was begun, unless it is ready meanwhile."""
        if await self._files.undo(file):
            await self._clear(file)

    async def remove_unused(self, sha256: str, fence: int | None = None) -> None:
        """Remove bytes, unless a row has them; a sweep gives its fence."""
        async with self._files.unused(sha256, fence) as unused:
            if unused:
                await self._blobs.remove(sha256)

    async def give_back(self, file_id: str, user_id: str | None) -> None:
        """Pay the debt of a file that is gone."""
        async with asyncio.timeout(GIVE_BACK_SECONDS):
            await self._quota.release(file_id, user_id)
        await self._files.pay(file_id)

    async def _judged(self, file: File) -> Verdict:
        found = verdict(file, await self._tasks.standing(file.task_id or ""))
        if found is Verdict.TAKEN:
            await self._files.confirm(file.task_id or "", file.file_id)
        return found

    async def _refuse(self, file: File) -> None:
        if await self._files.refuse(file.file_id):
            await self._clear(file)

    async def _clear(self, file: File) -> None:
        """Follow a row that is gone with its bytes and its quota; what fails here, upkeep does later."""
        await tried(self.remove_unused(file.sha256))
        await tried(self.give_back(file.file_id, file.user_id))


async def tried(step: Awaitable[None]) -> None:
    """Take a step that upkeep takes again when it fails."""
    try:
        await step
    except (MeshError, OSError) as error:  # a timeout is an OSError
        log.warning("upkeep put off", extra={"failure": repr(error)})
