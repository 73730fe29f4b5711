"""A replica that does housekeeping, also as a process: `python -m tests.service.mesh.housekeeper <folder> …`.

Each step writes down its fence, in the transaction that asks whether the fence is the newest. The process stops itself
before its next step when there is a file `stop` in the folder: with the fence in its hand, and no transaction open.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from sqlalchemy import Column, Integer, MetaData, String, Table, insert, select

from mesh import database, lock, service
from mesh.config import ServiceConfig
from mesh.database import Database

WORK = "sweep"
metadata = MetaData()
fences = lock.table(metadata)
steps = Table(
    "step",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("instance", String, nullable=False),
    Column("fence", Integer, nullable=False),
)


async def made(sql: Database) -> None:
    """Make the tables."""
    async with sql.transaction() as connection:
        await connection.run_sync(metadata.create_all)


async def step(sql: Database, instance: str, fence: int) -> None:
    async with sql.transaction() as connection:
        await lock.require(connection, fences, WORK, fence)
        await connection.execute(insert(steps).values(instance=instance, fence=fence))


async def done(sql: Database) -> list[tuple[str, int]]:
    """Return who took each step, with which fence, in order."""
    async with sql.reading() as connection:
        found = await connection.execute(select(steps.c.instance, steps.c.fence).order_by(steps.c.number))
        return [tuple(row) for row in found]


def works(config: ServiceConfig, sql: Database, step: lock.Step) -> service.Background:
    return lock.Locks(config, sql, fences).alone(WORK, 0.1, step)


async def main(folder: Path, url: str, consul_url: str, secrets: Path, instance: str) -> None:
    class Config(ServiceConfig):
        service = "storage"

    config = Config(
        ATELIER_CONSUL_URL=consul_url, ATELIER_BROKER_URL="", ATELIER_CONTROL_ADDRESSES="",
        ATELIER_DATA_DIR=folder, ATELIER_SECRETS_DIR=secrets, ATELIER_INSTANCE=instance,
    )  # fmt: skip
    stop = folder / "stop"

    async def stopping_step(fence: int) -> None:
        if stop.exists():
            stop.unlink()
            os.kill(os.getpid(), signal.SIGSTOP)
        await step(sql, instance, fence)

    async with database.opened(url) as sql, service.working([works(config, sql, stopping_step)], config):
        await asyncio.Event().wait()


if __name__ == "__main__":
    _, folder, url, consul_url, secrets, instance = sys.argv
    asyncio.run(main(Path(folder), url, consul_url, Path(secrets), instance))
