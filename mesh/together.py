"""Calls that come while one is under way wait, and are then done together: one transaction for many."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Together(Generic[Item, Result]):
    """Does items, those that wait at the same time in one go. Whoever is alone waits for nobody.

    Args:
        do: does some items and returns, in order, what became of each; an exception is raised to that item's caller.
            When it raises itself, that is raised to all.
        at_most: items in one go.
    """

    def __init__(
        self, do: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]], *, at_most: int
    ) -> None:
        self._do = do
        self._at_most = at_most
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        """Return what becomes of an item. Cancelled before its turn, it is not done; later, it is all the same."""
        waiter: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, waiter))
        if self._running is None or self._running.done():
            # Of no request: what is done for many has nobody's deadline.
            self._running = asyncio.create_task(self._run(), context=contextvars.Context())
        return await waiter

    async def _run(self) -> None:
        while self._waiting:
            taken = [self._waiting.popleft() for _ in range(min(self._at_most, len(self._waiting)))]
            taken = [(item, waiter) for item, waiter in taken if not waiter.done()]
            results: Sequence[Result | Exception] = []
            try:
                results = await self._do([item for item, _ in taken]) if taken else []
            except Exception as error:  # noqa: BLE001 - it is raised to those who wait
                results = [error] * len(taken)
            finally:
                for _, waiter in taken[len(results) :]:  # cancelled
                    waiter.cancel()
            for (_, waiter), result in zip(taken, results, strict=True):
                if waiter.done():
                    continue
                if isinstance(result, Exception):
                    waiter.set_exception(result)
                else:
                    waiter.set_result(result)
