"""Work that one replica does for all: Consul elects it, and the service's own database fences off the one before.

For housekeeping only, which nobody misses for a day: without Consul it rests. What a task's progress needs is shared
among replicas by rows in the database.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

import consul
import consul.aio
from sqlalchemy import BigInteger, Column, MetaData, String, Table, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh import discovery
from mesh.config import ServiceConfig
from mesh.database import Database, insert_if_absent
from mesh.errors import Aborted

TTL_SECONDS = 10  # the least that Consul takes; it may take twice as long to notice
RENEW_SECONDS = 3.0  # several tries before the session ends
RETRY_SECONDS = 5.0  # housekeeping is in no hurry

Step = Callable[[int], Awaitable[None]]
"""Housekeeping; gives its fence to every transaction in which it changes something."""

log = logging.getLogger(__name__)


class LockLost(Aborted):
    reason = "LOCK_LOST"


def table(metadata: MetaData) -> Table:
    """Return the table, made in a service's own metadata: the newest fence of each work."""
    return Table(
        "lock",
        metadata,
        Column("work", String, primary_key=True),
        Column("fence", BigInteger, nullable=False),
    )


async def draw(connection: AsyncConnection, table: Table, work: str) -> int:
    """Return a fence higher than all before, which from now on are refused."""
    await insert_if_absent(connection, table, {"work": work, "fence": 0})
    mine = table.c.work == work
    await connection.execute(update(table).where(mine).values(fence=table.c.fence + 1))
    fence: int = (await connection.execute(select(table.c.fence).where(mine))).scalar_one()
    return fence


async def require(connection: AsyncConnection, table: Table, work: str, fence: int) -> None:
    """Refuse a step of whoever has been replaced; nobody is, until this transaction ends.

    Raises:
        LockLost: another replica does the work.
    """
    newest = select(table.c.fence).where(table.c.work == work).with_for_update()
    if (await connection.execute(newest)).scalar_one_or_none() != fence:
        raise LockLost(f"Another replica does {work} now.", metadata={"work": work})


class Locks:
    """The works of one service.

    Args:
        config: of the service; a lock's key is `locks/<service>/<work>`.
        database: the service's own.
        table: from `table`.
    """

    def __init__(self, config: ServiceConfig, database: Database, table: Table) -> None:
        self._config = config
        self._database = database
        self._table = table

    def alone(self, work: str, seconds: float, step: Step) -> Callable[[], Awaitable[None]]:
        """Return background work that takes `step` while this replica holds the lock, as `mesh.service.every` would."""

        async def run() -> None:
            async with discovery.connected(self._config) as client:
                while True:
                    since = time.monotonic()
                    session = await self._elected(client, work)
                    if session:
                        try:
                            await self._work(work, seconds, step, _renew(client, session, since))
                        finally:
                            await _released(client, session)
                    await asyncio.sleep(RETRY_SECONDS * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, no secret

        return run

    async def _elected(self, client: consul.aio.Consul, work: str) -> str:
        """Return the session that holds the lock; empty while another replica has it, or Consul is away."""
        key = f"locks/{self._config.service}/{work}"
        session: str = ""
        try:
            async with asyncio.timeout(discovery.ANSWER_SECONDS):
                _, held = await client.kv.get(key)
                if held and "Session" in held:
                    return ""
                # No lock-delay: it is time for old holders that cannot be fenced off.
                session = await client.session.create(name=key, ttl=TTL_SECONDS, lock_delay=0)
                if await client.kv.put(key, self._config.instance, acquire=session):
                    return session
        except discovery.FAILURES as error:
            log.debug("housekeeping rests", extra={"work": work, "failure": repr(error)})
        if session:
            await _released(client, session)
        return ""

    async def _work(self, work: str, seconds: float, step: Step, session_ends: Coroutine[Any, Any, None]) -> None:
        """Take steps until the session ends, or another replica has drawn a fence."""
        renewing = asyncio.create_task(session_ends)
        try:
            async with self._database.transaction() as connection:
                fence = await draw(connection, self._table, work)
            log.info("housekeeping begins here", extra={"work": work, "fence": fence})
            try:
                while not renewing.done():
                    # Not broken off in the middle when the session ends: the fence judges what comes too late.
                    await step(fence)
                    await asyncio.wait([renewing], timeout=seconds)
            except LockLost as lost:
                log.info("housekeeping was taken over: %s", lost.message)
            finally:
                log.info("housekeeping ends here", extra={"work": work, "fence": fence})
        finally:
            renewing.cancel()


async def _renew(client: consul.aio.Consul, session: str, since: float) -> None:
    """Return when the session has ended, or by our own clock may have, whatever Consul is doing."""
    while (left := since + TTL_SECONDS - time.monotonic()) > 0:
        await asyncio.sleep(min(RENEW_SECONDS, left))
        asked = time.monotonic()
        try:
            async with asyncio.timeout(discovery.ANSWER_SECONDS):
                await client.session.renew(session)
        except consul.NotFound:
            return
        except discovery.FAILURES:
            continue
        since = asked


async def _released(client: consul.aio.Consul, session: str) -> None:
    """End a session, and with it its lock; where Consul is away it ends by itself."""
    with suppress(*discovery.FAILURES):
        async with asyncio.timeout(discovery.ANSWER_SECONDS):
            await client.session.destroy(session)
