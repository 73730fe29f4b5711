"""Calls that come while one is under way wait and are then done together: one transaction for many."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from mesh.errors import MeshError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Together(Generic[Item, Result]):
    """Does items, those that wait at the same time in one go. Whoever is alone waits for nobody.

    Args:
        do: does some items and returns, in order, what became of each; an exception is raised to that item's caller.
            When it raises itself it has done nothing: a MeshError is raised to all, and after any other exception
            each is done by itself, since one may be at fault for it.
        at_most: items in one go.
    """

    def __init__(
        self,
        do: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]],
        *,
        at_most: int,
    ) -> None:
        self._do = do
        self._at_most = at_most
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._present: Sequence[asyncio.Future[Result]] = ()  # who waits for what is being done
        self._doing: asyncio.Task[Sequence[Result | Exception]] | None = None
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        """Return what becomes of an item.

        Cancelled before its turn, it is not done; later, it is done with the others, unless they are cancelled, too.
        """
        waiter: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, waiter))
        if self._running is None or self._running.done():
            # Of no request: what is done for many has nobody's deadline.
            self._running = asyncio.create_task(self._run(), context=contextvars.Context())
        try:
            return await waiter
        finally:
            if waiter in self._present and self._doing is not None and all(each.done() for each in self._present):
                self._doing.cancel()

    async def _run(self) -> None:
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(self._at_most, len(self._waiting)))]
            taken = [(item, waiter) for item, waiter in taken if not waiter.done()]
            if not taken:
                continue
            self._present = [waiter for _, waiter in taken]
            doing = self._doing = asyncio.create_task(self._outcomes([item for item, _ in taken]))
            await asyncio.wait([doing])
            results = [] if doing.cancelled() else doing.result()
            self._present = ()
            for waiter in [waiter for _, waiter in taken][len(results) :]:
                waiter.cancel()
            for (_, waiter), result in zip(taken, results, strict=False):
                if waiter.done():
                    continue
                if isinstance(result, Exception):
                    waiter.set_exception(result)
                else:
                    waiter.set_result(result)

    async def _outcomes(self, items: Sequence[Item]) -> Sequence[Result | Exception]:
        try:
            return await self._do(items)
        except Exception as error:  # noqa: BLE001 - it is raised to those who wait
            if len(items) == 1 or isinstance(error, MeshError):
                return [error] * len(items)
        return [outcome for item in items for outcome in await self._outcomes([item])]
