from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import MetaData, func, select

from mesh import database, outbox
from mesh.database import Database
from mesh.errors import Unavailable
from mesh.outbox import Message, MessageUnroutable, Outbox, Publisher
from tests.databases import are_waiting, on_postgresql
from tests.eventually import eventually

metadata = MetaData()
table = outbox.table(metadata)

DIE_AFTER_PUBLISHING = """
import asyncio, os, sys
from datetime import timedelta
from mesh import database
from mesh.outbox import Outbox
from tests.service.mesh.test_outbox import table

class Broker:
    async def publish(self, *messages):
        for message in messages:
            print(message.message_id, flush=True)
            if message.message_id == "2":
                os.kill(os.getpid(), 9)

async def main():
    async with database.opened(sys.argv[1]) as opened:
        await Outbox(opened, table, lease=timedelta(seconds=1)).relay(Broker())

asyncio.run(main())
"""


class Broker:
    """Satisfies `outbox.Publisher`; `failure` is raised instead while it is set."""

    def __init__(self) -> None:
        self.published: list[str] = []
        self.calls = 0
        self.together: list[int] = []  # how many came in each that succeeded
        self.failure: Exception | None = None
        self.unwanted: set[str] = set()

    async def publish(self, *messages: Message) -> None:
        self.calls += 1
        await asyncio.sleep(0.001)
        if self.failure:
            raise self.failure
        if self.unwanted & {message.routing_key for message in messages}:
            raise MessageUnroutable("nobody")
        self.published += [message.message_id for message in messages]
        self.together.append(len(messages))


class Hanging:
    """Satisfies `outbox.Publisher`; never confirms, and tells by `stuck` that it was asked to."""

    def __init__(self, stuck: asyncio.Event) -> None:
        self._stuck = stuck

    async def publish(self, *_messages: Message) -> None:
        self._stuck.set()
        await asyncio.Event().wait()


def message(message_id: str, *, subject: str = "", routing_key: str = "key") -> Message:
    return Message("exchange", routing_key, b"body", message_id, {"a": "b"}, subject=subject)


@asynccontextmanager
async def background(run: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture
async def opened(url: str) -> AsyncIterator[Database]:
    async with database.opened(url) as opened:
        async with opened.transaction() as connection:
            await connection.run_sync(metadata.create_all)
        yield opened


@asynccontextmanager
async def relaying(box: Outbox, publisher: Publisher) -> AsyncIterator[None]:
    async with background(lambda: box.relay(publisher)):
        await asyncio.sleep(0)  # it holds what is added from here on
        yield


async def add(opened: Database, *messages: Message, box: Outbox | None = None) -> None:
    async with opened.transaction() as connection:
        await (box or Outbox(opened, table)).add(connection, *messages)


async def rows(opened: Database) -> int:
    async with opened.reading() as connection:
        return await connection.scalar(select(func.count()).select_from(table)) or 0


async def is_empty(opened: Database) -> bool:
    return await rows(opened) == 0


async def test_a_message_arrives_as_it_was_added_and_its_row_goes(opened: Database) -> None:
    seen: list[Message] = []

    class Recorder:
        async def publish(self, *messages: Message) -> None:
            seen.extend(messages)

    await add(opened, message("1", subject="tsk_1"))
    async with relaying(Outbox(opened, table), Recorder()):
        await eventually(lambda: is_empty(opened))

    assert seen == [message("1", subject="tsk_1")]


async def test_what_a_replica_adds_it_sends_without_a_look(opened: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    broker, box = Broker(), Outbox(opened, table)
    async with relaying(box, broker):
        await asyncio.sleep(0.2)  # it has looked and found nothing
        monkeypatch.setattr(outbox, "advisory_lock", None)  # the next look fails

        for number in range(3):
            await add(opened, message(f"{number}/1", subject="tsk_1"), message(f"{number}/2", subject="tsk_1"), box=box)

        sent = ["0/1", "0/2", "1/1", "1/2", "2/1", "2/2"]
        await eventually(lambda: broker.published == sent, within_seconds=outbox.POLL_SECONDS / 2)
        await eventually(lambda: is_empty(opened), within_seconds=outbox.POLL_SECONDS / 2)


async def test_what_comes_while_the_relay_rests_leaves_together(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "REST_SECONDS_EACH", 1.0)
    monkeypatch.setattr(outbox, "MAX_REST_SECONDS", 2.0)
    broker, box = Broker(), Outbox(opened, table)

    async with relaying(box, broker):
        await add(opened, *(message(str(number)) for number in range(10)), box=box)
        await eventually(lambda: broker.together == [10])
        await add(opened, message("10"), box=box)
        await add(opened, message("11"), box=box)
        await eventually(lambda: len(broker.published) == 12, within_seconds=7)  # of ten seconds at most two

    assert broker.together == [10, 2]


async def test_of_a_subject_none_goes_before_an_earlier_ones_transaction_is_known_to_have_ended(
    opened: Database,
) -> None:
    broker, box = Broker(), Outbox(opened, table)
    held: list[Callable[[bool], None]] = []
    async with relaying(box, broker):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(outbox, "when_ended", lambda _, tell: held.append(tell))  # the answer to COMMIT is late
            await add(opened, message("1", subject="tsk_1"), box=box)
        await add(opened, message("2", subject="tsk_1"), message("3", subject="tsk_2"), box=box)
        await eventually(lambda: broker.published == ["3"])
        held[0](True)
        await eventually(lambda: broker.published == ["3", "1", "2"])


async def test_what_may_have_been_committed_is_not_overtaken(opened: Database) -> None:
    broker, box = Broker(), Outbox(opened, table, lease=timedelta(seconds=1))
    held: list[Callable[[bool], None]] = []
    async with relaying(box, broker):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(outbox, "when_ended", lambda _, tell: held.append(tell))
            await add(opened, message("1", subject="tsk_1"), box=box)
        held[0](False)  # the answer to COMMIT was lost
        await add(opened, message("2", subject="tsk_1"), box=box)
        await eventually(lambda: is_empty(opened), within_seconds=10)

    assert broker.published == ["1", "2"]


async def test_what_is_more_than_a_replica_holds_is_sent_too(opened: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "HELD", 3)
    broker, box = Broker(), Outbox(opened, table)
    async with relaying(box, broker):
        await add(opened, *(message(str(number), subject="tsk_1") for number in range(5)), box=box)
        await eventually(lambda: is_empty(opened))

    assert broker.published == [str(number) for number in range(5)]


async def test_a_failed_transaction_sends_nothing(opened: Database) -> None:
    broker, box = Broker(), Outbox(opened, table)

    async def fail_late() -> None:
        async with opened.transaction() as connection:
            await box.add(connection, message("never"))
            raise ZeroDivisionError

    async with relaying(box, broker):
        with pytest.raises(ZeroDivisionError):
            await fail_late()
        await add(opened, message("1"), box=box)
        await eventually(lambda: is_empty(opened))

    assert broker.published == ["1"]


async def test_two_replicas_send_each_message_once_and_keep_the_order_of_a_subject(opened: Database, url: str) -> None:
    broker = Broker()
    subjects = ["tsk_1", "tsk_2", "tsk_3"]
    async with database.opened(url) as other:
        boxes = [Outbox(opened, table), Outbox(other, table)]
        async with relaying(boxes[0], broker), relaying(boxes[1], broker):
            for number in range(100):
                messages = [message(f"{subject}/{number:03d}", subject=subject) for subject in subjects]
                await add(opened, *messages, box=boxes[number // 3 % 2])
            await eventually(lambda: is_empty(opened), within_seconds=20)

    for subject in subjects:
        assert [sent for sent in broker.published if sent.startswith(subject)] == [
            f"{subject}/{number:03d}" for number in range(100)
        ]


@on_postgresql
async def test_of_two_replicas_that_look_at_the_same_time_one_sends(opened: Database, url: str) -> None:
    broker = Broker()

    await add(opened, message("1"))
    async with database.opened(url) as other, AsyncExitStack() as stack:
        async with opened.transaction() as connection:
            await connection.execute(select(table).with_for_update())  # it can be seen, and not be claimed yet
            for each in (opened, other):
                await stack.enter_async_context(relaying(Outbox(each, table), broker))
            await eventually(lambda: are_waiting(opened, 2))
        await eventually(lambda: is_empty(opened))

    assert broker.published == ["1"]


async def test_messages_that_go_the_same_way_leave_as_one_and_a_subjects_one_after_the_other(opened: Database) -> None:
    broker = Broker()
    permits = [replace(message(f"permit/{number}"), exchange="", routing_key="queue") for number in range(3)]
    created = [message(f"{number}/1", subject=f"tsk_{number}") for number in range(150)]
    await add(opened, *created, message("0/2", subject="tsk_0"), message("0/3", subject="tsk_0"), *permits)
    async with relaying(Outbox(opened, table), broker):
        await eventually(lambda: is_empty(opened))

    assert sorted(broker.together) == [1, 1, 1, 1, 1, 50, outbox.TOGETHER]
    assert len(set(broker.published)) == len(broker.published) == 155
    assert [each for each in broker.published if each.startswith("0/")] == ["0/1", "0/2", "0/3"]


async def test_nothing_is_lost_while_the_broker_is_away(opened: Database) -> None:
    broker = Broker()
    broker.failure = Unavailable("away")
    box = Outbox(opened, table)
    async with relaying(box, broker):
        for number in range(5):
            await add(opened, message(str(number), subject="tsk_1"), box=box)
            await asyncio.sleep(0.1)
        broker.failure = None
        await eventually(lambda: is_empty(opened), within_seconds=10)

    assert broker.published == ["0", "1", "2", "3", "4"]


async def test_a_broker_that_is_away_is_asked_ever_less_often(opened: Database) -> None:
    broker = Broker()
    broker.failure = Unavailable("away")
    await add(opened, message("1"))
    began = time.monotonic()

    async with relaying(Outbox(opened, table), broker):
        await eventually(lambda: broker.calls >= 5)

    rests = sum(0.1 * 2**number for number in range(broker.calls - 1))  # the shortest, of which each is twice the last
    assert rests <= time.monotonic() - began


async def test_what_was_given_back_goes_before_what_was_added_after_it(
    opened: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "BATCH", 2)
    stuck, broker = asyncio.Event(), Broker()
    await add(opened, *(message(str(number), subject="tsk_1") for number in range(3)))
    async with relaying(Outbox(opened, table), Hanging(stuck)):
        await stuck.wait()

    async with relaying(Outbox(opened, table), broker):
        await eventually(lambda: is_empty(opened))

    assert broker.published == ["0", "1", "2"]  # PostgreSQL finds a row that was changed after one that was not


async def test_what_another_has_by_now_is_not_given_back(opened: Database, url: str) -> None:
    begun, taken = asyncio.Event(), asyncio.Event()

    class Late:
        async def publish(self, *_messages: Message) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:  # its lease is nearly over, and it learns that only when another has the row
                await taken.wait()

    async def another() -> None:
        await begun.wait()
        async with database.opened(url) as other:
            await Outbox(other, table).relay(Hanging(taken))

    async def holder() -> str | None:
        async with opened.reading() as connection:
            return await connection.scalar(select(table.c.holder))

    await add(opened, message("1"))
    async with background(another):
        async with relaying(Outbox(opened, table, lease=timedelta(seconds=0.5)), Late()):
            await taken.wait()
            before = await holder()

        assert (before is not None, await holder()) == (True, before)


async def test_a_message_that_nobody_takes_yet_holds_up_only_its_own_subject(opened: Database) -> None:
    broker = Broker()
    broker.unwanted = {"new"}
    await add(
        opened,
        message("1", subject="tsk_1", routing_key="new"),
        message("2", subject="tsk_1"),
        message("3", subject="tsk_2"),
    )
    async with relaying(Outbox(opened, table, lease=timedelta(seconds=1)), broker):
        await eventually(lambda: broker.published == ["3"])
        broker.unwanted = set()
        await eventually(lambda: is_empty(opened))

    assert broker.published == ["3", "1", "2"]


async def test_a_hint_that_nobody_takes_is_dropped_and_holds_nobody_up(opened: Database) -> None:
    broker = Broker()
    broker.unwanted = {"media.gpu"}
    hints = [message(f"hint {number}", routing_key="media.gpu") for number in range(3 * outbox.BATCH)]
    await add(opened, *hints, message("event", subject="tsk_1"))

    async with relaying(Outbox(opened, table), broker):
        await eventually(lambda: broker.published == ["event"])
        await eventually(lambda: is_empty(opened))


async def test_a_stopped_relay_leaves_no_message_claimed(opened: Database) -> None:
    stuck = asyncio.Event()
    await add(opened, message("1"))
    async with relaying(Outbox(opened, table), Hanging(stuck)):
        await stuck.wait()
    broker = Broker()
    async with relaying(Outbox(opened, table), broker):
        await eventually(lambda: broker.published == ["1"], within_seconds=1)


async def test_a_relay_killed_between_publishing_and_deleting_means_a_duplicate_and_no_loss(
    opened: Database, url: str
) -> None:
    await add(opened, *(message(str(number), subject="tsk_1") for number in range(1, 5)))

    killed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DIE_AFTER_PUBLISHING, url, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await killed.communicate()
    broker = Broker()
    async with relaying(Outbox(opened, table), broker):
        await eventually(lambda: is_empty(opened))

    assert (killed.returncode, output.split()) == (-9, [b"1", b"2"])
    assert broker.published == ["1", "2", "3", "4"]
