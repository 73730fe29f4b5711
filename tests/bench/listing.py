"""Listing one's tasks among ten thousand, a hundred thousand and a million: it takes as long."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import product

from sqlalchemy import BigInteger, String, case, cast, insert, join, literal, select, text, true, type_coerce

from mesh import database, migrations
from mesh.database import Database, Timestamp
from mesh.outbox import Outbox
from services.task import convert, domain
from services.task.domain import Query, State
from services.task.repository import SqlTasks
from services.task.tables import outbox_table
from services.task.tables import task as task_table
from services.task.tables import task_batch as batch_table
from tests import postgres
from tests.bench.report import Figures, arguments, tell

SIZES = (10_000, 100_000, 1_000_000)
MOST = "usr_1"
LISTINGS = 20  # of each kind, a round; the median counts
BATCH = 1_000
FIRST_ID = 1_000_000_000  # so that ids sort as numbers do
STEP_MICROSECONDS = 1_000_000  # between two tasks

HOW = (
    f"The task service's own repository over a real SQLite and a real PostgreSQL, pages of 50, {LISTINGS} listings of "
    f"a kind a round, the sizes in turn. One user has 60 % of the tasks, a hundred the others; batches hold {BATCH:,}; "
    "every hundredth task is RUNNING. Deep pages begin in the middle. The ratio is the time among ten thousand to "
    "that among a million: 1 is constant time."
)


async def fill(sql: Database, size: int) -> None:
    """Have `size` tasks, all copies of one that the repository made."""
    tasks = SqlTasks(sql, Outbox(sql, outbox_table), convert.message_of, convert.hook_body)
    made = partial(
        domain.created, task_id="tsk_0", user_id=MOST, role="ROLE_USER", input_file_id="fil_1", file_ids=("fil_1",),
        operation=bytes(40),
    )  # fmt: skip
    await tasks.add("tsk_0", made)
    numbers = select(literal(1, BigInteger).label("number")).cte("numbers", recursive=True)
    numbers = numbers.union_all(select(numbers.c.number + 1).where(numbers.c.number < size))
    number = numbers.c.number
    batch = number // BATCH
    owner = case((batch % 10 < 6, literal(MOST)), else_=literal("usr_") + cast(batch % 100 + 2, String))
    differing = {
        "task_id": literal("tsk_") + cast(number + FIRST_ID, String),
        "user_id": owner,
        "state": case((number % 100 == 0, literal(str(State.RUNNING))), else_=literal(str(State.SUCCEEDED))),
        "batch_id": literal("bat_") + cast(batch, String),
        "create_time": type_coerce(number * STEP_MICROSECONDS, Timestamp),
    }
    columns = [differing.get(column.name, column) for column in task_table.columns]
    copies = select(*columns).select_from(join(task_table, numbers, true())).where(task_table.c.task_id == "tsk_0")
    owners = select(differing["batch_id"], owner, literal(BATCH), differing["create_time"]).where(number % BATCH == 1)
    async with sql.transaction() as connection:
        await connection.execute(insert(task_table).from_select([column.name for column in task_table.columns], copies))
        await connection.execute(
            insert(batch_table).from_select(["batch_id", "user_id", "size", "create_time"], owners)
        )
        if connection.dialect.name == "postgresql":
            await connection.execute(text("ANALYZE"))  # as its autovacuum does; SQLite knows no statistics here, either


def kinds(size: int) -> dict[str, Query]:
    """Return a page of each kind of the tasks of whom most are."""
    first = Query(MOST, state=None, batch_id=None, after=None, size=50)
    number = size // 2
    after = datetime.fromtimestamp(number * STEP_MICROSECONDS / 1_000_000, UTC), f"tsk_{number + FIRST_ID}"
    batch_id = f"bat_{number // BATCH // 10 * 10}"  # of ten in a row the first six are of one user
    return {
        "first": first,
        "deep": replace(first, after=after),
        "by_state": replace(first, state=State.RUNNING),
        "by_state_deep": replace(first, state=State.SUCCEEDED, after=after),
        "by_batch": replace(first, batch_id=batch_id),
        "by_batch_and_state": replace(first, batch_id=batch_id, state=State.SUCCEEDED),
    }


async def measure(name: str, urls: Mapping[int, str], rounds: int) -> list[Figures]:
    """Return what listings take among each number of tasks, whose databases are at `urls`."""
    async with AsyncExitStack() as stack:
        filled = {}
        for size, url in urls.items():
            await migrations.upgrade("task", url)
            sql = await stack.enter_async_context(database.opened(url))
            await fill(sql, size)
            filled[size] = SqlTasks(sql, Outbox(sql, outbox_table), convert.message_of, convert.hook_body)
        figures = {size: Figures(f"{name}, {size:,}") for size in urls}
        for _ in range(rounds):
            taken: dict[int, dict[str, list[float]]] = {size: {kind: [] for kind in kinds(size)} for size in urls}
            # In turn: what slows the machine slows all sizes.
            for _, kind, (size, tasks) in product(range(LISTINGS), kinds(1), filled.items()):
                query = kinds(size)[kind]
                began = time.perf_counter()
                page = await tasks.page(query)
                taken[size][kind].append((time.perf_counter() - began) * 1000)
                if not page.tasks:
                    raise RuntimeError(f"nothing was found: {query}")
            for size, each in figures.items():
                each.add(**{kind: statistics.median(times) for kind, times in taken[size].items()})
    return list(figures.values())


def main() -> None:
    options = arguments(__doc__ or "", rounds=3)
    with tempfile.TemporaryDirectory() as folder, postgres.running() as server:
        sqlite = {size: f"sqlite+aiosqlite:///{folder}/{size}.db" for size in SIZES}
        postgresql = {size: server.url(server.create()) for size in SIZES}
        found = [
            asyncio.run(measure(name, urls, options.rounds))
            for name, urls in {"SQLite": sqlite, "PostgreSQL": postgresql}.items()
        ]
    tell(
        "A page of a user's tasks, by how many tasks there are",
        HOW,
        [each for by_size in found for each in by_size],
        dict.fromkeys(kinds(1), "ms"),
        {
            f"{least.name} ({kind.replace('_', ' ')})": least.ratios(kind, most)
            for least, *_, most in found
            for kind in least.values
        },
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
