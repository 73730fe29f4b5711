"""What no request does: puts right what broke off halfway, and removes what nobody has."""

from __future__ import annotations

from mesh.lock import Locks
from mesh.service import Background, every
from services.storage.domain import SWEEP, Blobs, Files
from services.storage.keeping import Keeping, tried

TEND_SECONDS = 15.0
STALE_SECONDS = 300.0  # much longer than the calls between a row's begin and its end may take together
UNCONFIRMED_SECONDS = 120.0  # the event comes within a second or so; then the task service is asked


class Upkeep:
    """Keeps rows, bytes and quota in agreement while its `work` runs.

    Args:
        files: the rows.
        blobs: the bytes.
        keeping: takes files away.
        sweep_seconds: between two walks over all bytes.
        grace_seconds: how old bytes without a row must be; much longer than an upload may take.
    """

    def __init__(
        self, files: Files, blobs: Blobs, keeping: Keeping, *, sweep_seconds: float = 3600, grace_seconds: float = 3600
    ) -> None:
        self._files = files
        self._blobs = blobs
        self._keeping = keeping
        self._sweep_seconds = sweep_seconds
        self._grace_seconds = grace_seconds

    def work(self, locks: Locks) -> list[Background]:
        """Return what must run for ever: on every replica what people wait for, on one what nobody misses for a day."""
        return [every(TEND_SECONDS, self.tend), locks.alone(SWEEP, self._sweep_seconds, self.sweep)]

    async def tend(self) -> None:
        """Undo what broke off, settle what waits for a task, and give quota back."""
        for file in await self._files.stale(STALE_SECONDS):
            await tried(self._keeping.undo(file))
        for result in await self._files.unconfirmed(UNCONFIRMED_SECONDS):
            await tried(self._keeping.settle(result))
        for file_id, user_id in (await self._files.debts()).items():
            await tried(self._keeping.give_back(file_id, user_id))

    async def sweep(self, fence: int) -> None:
        """Remove bytes that no row has, and ids that are past their time."""
        await self._files.forget(fence)
        # Without a fence: they are judged by their age alone, and whoever was stopped meanwhile takes only older ones.
        await self._blobs.remove_leftovers(self._grace_seconds)
        async for prefix, contents in self._blobs.older_than(self._grace_seconds):
            for sha256 in set(contents) - set(await self._files.known_contents(prefix)):
                await self._keeping.remove_unused(sha256, fence)
