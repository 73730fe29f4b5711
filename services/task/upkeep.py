"""What no request does: takes tasks from lost workers, ends late ones, and replaces permits that the broker lost.

Every replica runs one, and needs no lock: each step judges anew inside its transaction, so that two at once do no harm.
Only what nobody misses for a day is left to one replica.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Protocol

from mesh import ids
from mesh.errors import Unavailable
from mesh.lock import Locks
from mesh.outbox import Message
from mesh.service import Background, every
from services.task import convert, domain
from services.task.domain import Step, Task, Tasks, Terms

AT_ONCE = 100  # lapsed leases or late tasks in one round, so that a round stays short
REAP_SECONDS = 1.0
REPLENISH_SECONDS = 2.0
LOOK_SECONDS = 5.0
FORGET_SECONDS = 600.0
CUT_AT_ONCE = 500  # tasks in one transaction, so that nobody who writes waits long for it

log = logging.getLogger(__name__)


class Permits(Protocol):
    """The queues that hold permits."""

    async def depth(self, queue: str) -> int: ...

    async def consumers(self, queue: str) -> int: ...

    async def publish(self, message: Message) -> None: ...


class Upkeep:
    """Keeps tasks moving while its `work` runs.

    Args:
        tasks: where tasks are kept.
        permits: where permits wait.
        terms: returns what workers are promised now.
        absence: how long tasks may be due without any worker before that is an alarm.
        permit_grace: what the outbox and a free worker need with a fresh task's own permit.
        monotonic: seconds; for the rest after the start.
    """

    def __init__(
        self,
        tasks: Tasks,
        permits: Permits,
        terms: Callable[[], Terms],
        *,
        absence: timedelta = timedelta(seconds=60),
        permit_grace: timedelta = timedelta(seconds=2),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tasks = tasks
        self._permits = permits
        self._terms = terms
        self._permit_grace = permit_grace
        self._absence = absence
        self._monotonic = monotonic
        self._missing_since: dict[str, float] = {}
        self._unserved: set[str] = set()
        # While no replica ran, no worker could renew: each gets one lease to say that it lives.
        self._reap_from = monotonic() + (terms().lease + terms().slack).total_seconds()

    def work(self, locks: Locks) -> list[Background]:
        """Return what must run for ever: apart, so that a broker that is away does not keep lost tasks waiting."""
        return [
            every(REAP_SECONDS, self.reap),
            every(REAP_SECONDS, self.end_late),
            every(REPLENISH_SECONDS, self.replenish),
            every(LOOK_SECONDS, self.look_for_workers),
            locks.alone(domain.FORGET, FORGET_SECONDS, self.forget),
        ]

    def is_unserved(self, pool: str) -> bool:
        """Tell whether a pool has had due tasks and no worker for too long."""
        return pool in self._unserved

    def degraded(self) -> str:
        """Return what operators should know of this service; empty when all is well."""
        return " ".join(f"No worker serves the pool {pool}; tasks wait." for pool in sorted(self._unserved))

    async def look_for_workers(self) -> None:
        """Raise the alarm when tasks have been due without a worker, whoever takes permits, or end it."""
        for pool in domain.POOLS:
            due = await self._tasks.overdue(pool, timedelta(0))
            try:
                missing = bool(due) and not await self._permits.consumers(convert.queue(pool))
            except Unavailable:
                return  # without the broker nobody can tell: what was known stays
            self._judge(pool, due, missing=missing)

    def _judge(self, pool: str, due: int, *, missing: bool) -> None:
        if not missing:
            self._missing_since.pop(pool, None)
            if pool in self._unserved:
                self._unserved.remove(pool)
                log.info("workers serve the pool again", extra={"pool": pool})
            return
        absent_seconds = self._monotonic() - self._missing_since.setdefault(pool, self._monotonic())
        if absent_seconds >= self._absence.total_seconds() and pool not in self._unserved:
            self._unserved.add(pool)
            log.error("no worker serves the pool", extra={"pool": pool, "due": due})

    async def reap(self) -> None:
        """Take tasks whose lease has lapsed from their workers."""
        if self._monotonic() < self._reap_from:
            return
        for task_id in await self._tasks.lapsed(AT_ONCE):
            jitter = random.random()  # noqa: S311 - spreads tasks over time, keeps no secret
            task = await self._changed(task_id, partial(domain.lapsed, terms=self._terms(), jitter=jitter))
            if task is not None:
                log.warning("worker lost", extra={"task_id": task_id, "attempt": task.attempt, "state": task.state})

    async def end_late(self) -> None:
        """Fail the tasks whose deadline has passed."""
        more = True
        while more:  # a batch has one deadline for all
            late = await self._tasks.late(AT_ONCE)
            ended = [await self._changed(task_id, domain.overran) for task_id in late]
            more = len(late) == AT_ONCE and any(ended)

    async def _changed(self, task_id: str, step: Step) -> Task | None:
        """Take a step with a task; one that is in no state to take any holds up no other.

        Raises:
            Unavailable: nor could one with another task be taken.
        """
        try:
            return await self._tasks.change(task_id, step)
        except Unavailable:
            raise
        except Exception:
            log.exception("task cannot be changed", extra={"task_id": task_id})
            return None

    async def forget(self, fence: int) -> None:
        """Delete keys that nobody repeats any more, and tasks that ended longer ago than they are kept."""
        await self._tasks.forget(fence)
        while await self._tasks.cut(self._terms().kept, CUT_AT_ONCE, fence) == CUT_AT_ONCE:
            pass  # each step lets those who wait write before the next

    async def replenish(self) -> None:
        """Publish permits while tasks that are due have waited, up to as many as a batch has.

        That is so after the broker lost its queue, whenever a task's rest between two attempts is over, and when
        workers have come that no permit woke. Too many do no harm: a permit that finds nothing is acknowledged. With
        the broker away there is nothing to compare.
        """
        for pool in domain.POOLS:
            overdue = await self._tasks.overdue(pool, self._permit_grace)
            if not overdue:
                continue
            try:
                wanted = min(overdue, domain.PERMITS)
                for _ in range(wanted - await self._permits.depth(convert.queue(pool))):
                    await self._permits.publish(convert.permit(pool, ids.new("prm")))
            except Unavailable as failure:  # also when no worker has ever made the queue
                log.debug("permits wait", extra={"failure": failure.message})
