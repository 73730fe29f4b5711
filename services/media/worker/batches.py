"""Dynamic batching: items that come one by one are computed together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

from services.media.domain import OutOfMemory

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    result: asyncio.Future[Result]


class Batches(Generic[Item, Result]):
    """Collects items until there are enough or the first has waited long enough, whichever comes first.

    A batch that fails is halved until the items are found that fail by themselves: the others have their results. What
    fails for want of memory keeps later batches smaller. An item whose caller has gone is left out.

    Args:
        compute: makes results of items, in their order; called in a thread.
        threads: where; as many batches as it has threads are computed at a time.
        at_most: items in a batch.
        wait_seconds: how long the first item waits for others.
        at_once: batches that are computed at a time; those that follow are collected meanwhile.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Sequence[Result]],
        threads: Executor,
        *,
        at_most: int,
        wait_seconds: float,
        at_once: int,
    ) -> None:
        self._compute = compute
        self._threads = threads
        self.at_most = at_most
        self._wait_seconds = wait_seconds
        self._free = asyncio.Semaphore(at_once)
        self._waiting: asyncio.Queue[_Waiting[Item, Result]] = asyncio.Queue()
        self._computing: set[asyncio.Task[None]] = set()

    async def result(self, item: Item) -> Result:
        """Return what `compute` makes of an item.

        Raises:
            OutOfMemory: it needs more memory than there is, even alone.
            Exception: what `compute` raises for it alone.
        """
        waiting = _Waiting[Item, Result](item, asyncio.get_running_loop().create_future())
        self._waiting.put_nowait(waiting)
        return await waiting.result

    async def run(self) -> None:
        """Compute for ever; when cancelled, nothing more is computed."""
        try:
            while True:
                await self._free.acquire()
                computing = asyncio.create_task(self._finish(await self._collected()))
                self._computing.add(computing)
                computing.add_done_callback(self._finished)
        finally:
            for computing in self._computing:
                computing.cancel()

    async def _collected(self) -> Sequence[_Waiting[Item, Result]]:
        batch = [await self._waiting.get()]
        try:
            async with asyncio.timeout(self._wait_seconds):
                while len(batch) < self.at_most:
                    batch.append(await self._waiting.get())
        except TimeoutError:
            pass
        return batch

    async def _finish(self, batch: Sequence[_Waiting[Item, Result]]) -> None:
        batch = [each for each in batch if not each.result.done()]
        if not batch:
            return
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._threads, self._compute, [each.item for each in batch])
            pairs = list(zip(batch, results, strict=True))  # too few or too many: nobody knows whose they are
        except Exception as failure:  # noqa: BLE001 - whose it is shows when they are apart
            if len(batch) == 1:
                _fail(batch[0], failure)
                return
            half = len(batch) // 2
            if isinstance(failure, OutOfMemory):
                self.at_most = min(self.at_most, half)
            await self._finish(batch[:half])
            await self._finish(batch[half:])
        else:
            for each, result in pairs:
                if not each.result.done():
                    each.result.set_result(result)

    def _finished(self, computing: asyncio.Task[None]) -> None:
        self._computing.discard(computing)
        self._free.release()


def _fail(waiting: _Waiting[Item, Result], failure: Exception) -> None:
    if not waiting.result.done():
        waiting.result.set_exception(failure)
