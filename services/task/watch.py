"""The one source of all watches in a replica: what changed, from here, from other replicas, and by a poll.

A watcher holds no queue. Each watched task has its newest history in memory once, and a watcher replays from it what
came after its own cursor: however slow it is, it skips progress but never a state, and costs nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from datetime import timedelta
from functools import partial
from typing import Protocol

from mesh.clock import Clock
from mesh.context import User
from mesh.errors import DeadlineExceeded, Unauthenticated, Unavailable
from mesh.service import Background, every
from services.task.domain import History, Task, Tasks, Version, replayed, require_found

CHANGES = "task.changes"  # the broadcast between replicas; its bodies are task ids, apart by blanks
POLL_SECONDS = 1.0
REST_SECONDS = 0.1  # watchers at other replicas see progress that much later, when there is much of it
IDLE_SECONDS = 15.0  # below the idle timeouts of common proxies, 30 s and more
TOKEN_GRACE = timedelta(minutes=15)
LONGEST_SECONDS = 3590.0  # a little less than the contract's deadline, so that the end says why
READ_AT_ONCE = 500
UNANNOUNCED = 1000  # while the broker is away the poll does its work: what does not fit here is dropped


class TokenExpired(Unauthenticated):
    reason = "TOKEN_EXPIRED"


class WatchTooLong(DeadlineExceeded):
    reason = "WATCH_TOO_LONG"


class Broadcasts(Protocol):
    """Small messages to every replica, while the broker is there."""

    async def broadcast(self, name: str, body: bytes) -> None:
        """Tell the replicas that listen; when the broker is away nobody is told and nothing is raised."""

    def listen(self, name: str) -> AsyncIterator[bytes]: ...


class _Watched:
    """A task that somebody watches."""

    def __init__(self) -> None:
        self.history: History | None = None
        self.watchers = 0
        self._changed = asyncio.Event()

    def show(self, history: History) -> None:
        if self.history is None or self.history.task.version != history.task.version:
            self.history = history
            self._changed.set()
            self._changed = asyncio.Event()

    async def newer(self, than: History | None, seconds: float) -> bool:
        """Wait until there is another history; False when there was none in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.history is than:
                    await self._changed.wait()
        return self.history is not than


class Watches:
    """Lets any number of watchers follow tasks. Lives while its `work` runs."""

    def __init__(self, tasks: Tasks, clock: Clock, *, idle_seconds: float = IDLE_SECONDS) -> None:
        self._tasks = tasks
        self._clock = clock
        self._idle_seconds = idle_seconds
        self._watched: dict[str, _Watched] = {}
        self._stale: set[str] = set()
        self._stirred = asyncio.Event()
        self._unannounced: asyncio.Queue[str] = asyncio.Queue(UNANNOUNCED)

    async def follow(self, task_id: str, user: User, *, after: int | None) -> AsyncGenerator[Task | None]:
        """Yield the task now and after every change until it has ended; None whenever nothing happened for a while.

        Args:
            task_id: which task.
            user: whose it must be.
            after: sequence of the last event that arrived, whose successors are all replayed; None for from now.

        Raises:
            TaskNotFound: there is none of this user.
            TokenExpired: 15 minutes after the token did.
            WatchTooLong: after an hour.
        """
        require_found(await self._tasks.find(task_id), task_id, user.user_id)
        began = asyncio.get_running_loop().time()
        with self._watching(task_id) as watched:
            history, shown = None, None
            while True:
                if await watched.newer(history, self._idle_seconds):
                    history = watched.history
                    assert history is not None  # noqa: S101 - newer than none
                    for task in _news(history, after, shown):
                        yield task
                        after, shown = task.sequence, task.version
                    if history.task.state.ended:
                        return
                else:
                    yield None
                self._require_time(user, began)

    async def ended(self, task_id: str, user: User, *, within_seconds: float, stopping: asyncio.Event) -> Task:
        """Return the task once it has ended; else, after `within_seconds` or when `stopping` is set, as it then is.

        Raises:
            TaskNotFound: there is none of this user.
        """
        task = require_found(await self._tasks.find(task_id), task_id, user.user_id)
        if task.state.ended or within_seconds <= 0:
            return task
        waiting = [asyncio.create_task(self._end(task_id, user)), asyncio.create_task(stopping.wait())]
        try:
            await asyncio.wait(waiting, timeout=within_seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)  # why it broke off is asked below, of the database
        return require_found(await self._tasks.find(task_id), task_id, user.user_id)

    def has_watchers(self, task_id: str) -> bool:
        """Tell whether anybody follows a task, or waits for its end, in this replica."""
        return task_id in self._watched

    def changed(self, task_id: str) -> None:
        """Hear that this replica has changed a task."""
        self._stir(task_id)
        with contextlib.suppress(asyncio.QueueFull):
            self._unannounced.put_nowait(task_id)

    def work(self, broadcasts: Broadcasts) -> list[Background]:
        """Return what must run for ever."""
        return [
            self.refresh,
            every(POLL_SECONDS, self.poll),
            partial(self.announce, broadcasts),
            partial(self.listen, broadcasts),
        ]

    async def refresh(self) -> None:
        """Read the watched tasks that have changed and show them to their watchers, for ever."""
        while True:
            await self._stirred.wait()
            self._stirred.clear()
            stale, self._stale = [each for each in self._stale if each in self._watched], set()
            try:
                for start in range(0, len(stale), READ_AT_ONCE):
                    for history in await self._tasks.histories(stale[start : start + READ_AT_ONCE]):
                        if history.task.task_id in self._watched:  # its last watcher may have left
                            self._watched[history.task.task_id].show(history)
            except Unavailable:
                await asyncio.sleep(POLL_SECONDS)
                for task_id in stale:
                    self._stir(task_id)

    async def poll(self) -> None:
        """Notice which watched tasks have changed, whoever failed to say so."""
        watched = list(self._watched)
        for start in range(0, len(watched), READ_AT_ONCE):
            versions = await self._tasks.versions(watched[start : start + READ_AT_ONCE])
            for task_id, version in versions.items():
                seen = self._watched.get(task_id)
                if seen is not None and (seen.history is None or seen.history.task.version != version):
                    self._stir(task_id)

    async def announce(self, broadcasts: Broadcasts) -> None:
        """Tell the other replicas what this one has changed, for ever."""
        while True:
            changed = {await self._unannounced.get()}
            while not self._unannounced.empty():
                changed.add(self._unannounced.get_nowait())
            await broadcasts.broadcast(CHANGES, " ".join(changed).encode())
            await asyncio.sleep(REST_SECONDS)  # what changes meanwhile is told together

    async def listen(self, broadcasts: Broadcasts) -> None:
        """Hear what the other replicas have changed, for ever."""
        async for body in broadcasts.listen(CHANGES):
            for task_id in body.decode().split():
                self._stir(task_id)

    async def _end(self, task_id: str, user: User) -> None:
        async with contextlib.aclosing(self.follow(task_id, user, after=None)) as tasks:
            async for _ in tasks:
                pass

    @contextlib.contextmanager
    def _watching(self, task_id: str) -> Iterator[_Watched]:
        watched = self._watched.setdefault(task_id, _Watched())
        watched.watchers += 1
        self._stir(task_id)
        try:
            yield watched
        finally:
            watched.watchers -= 1
            if not watched.watchers:
                del self._watched[task_id]

    def _stir(self, task_id: str) -> None:
        if task_id in self._watched:
            self._stale.add(task_id)
            self._stirred.set()

    def _require_time(self, user: User, began: float) -> None:
        if self._clock.now() > user.expire_time + TOKEN_GRACE:
            raise TokenExpired(
                "The access token has expired. Refresh it, and watch again from the last cursor.",
                metadata={"expire_time": user.expire_time.isoformat()},
            )
        if asyncio.get_running_loop().time() - began > LONGEST_SECONDS:
            raise WatchTooLong(
                "A watch lasts an hour. Watch again from the last cursor.",
                metadata={"longest_seconds": str(LONGEST_SECONDS)},
            )


def _news(history: History, after: int | None, shown: Version | None) -> list[Task]:
    """Return what a watcher has not seen: the states after its cursor, or else newer progress of the state at it."""
    task = history.task
    if after is None:
        return [task]
    if task.sequence == after and not task.state.ended and task.version != shown:
        return [task]
    return [each for each in replayed(history) if each.sequence > after]
