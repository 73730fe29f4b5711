from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import aio_pika
import pytest
from atelier.task.v1 import events_pb2
from sqlalchemy import MetaData, func, select

from mesh import broker, database, events, ids, outbox, redrive
from mesh.broker import Broker, Delivery
from mesh.errors import Aborted, DeadlineExceeded, MeshError, ResourceExhausted, Unavailable
from mesh.events import event
from mesh.outbox import Message, MessageUnroutable, Outbox
from tests import rabbitmq
from tests.eventually import eventually

pytestmark = pytest.mark.timeout(180)

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

metadata = MetaData()
table = outbox.table(metadata)


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rabbitmq.Node]:
    with rabbitmq.running(tmp_path_factory.mktemp("rabbitmq")) as node:
        yield node


@pytest.fixture
async def opened(node: rabbitmq.Node) -> AsyncIterator[Broker]:
    async with broker.opened(node.url) as opened:
        yield opened


@pytest.fixture
def queue() -> str:
    """A queue of the test's own: the node is shared."""
    return ids.new("queue")


class Recorder:
    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.bodies: list[bytes] = []
        self.failures: list[Exception] = []  # raised first, one for each call

    async def __call__(self, delivery: Delivery) -> None:
        if self.failures:
            raise self.failures.pop()
        self.deliveries.append(delivery)
        self.bodies.append(delivery.body)


@asynccontextmanager
async def background(running: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(running)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


def permit(queue: str, body: bytes = b"1") -> Message:
    return Message(exchange="", routing_key=queue, body=body, message_id=ids.new("msg"))


async def is_published(opened: Broker, queue: str) -> bool:
    """Publish; `eventually` tries again while there is no such queue."""
    await opened.publish(permit(queue))
    return True


async def declare(opened: Broker, queue: str) -> None:
    """Let a consumer of the queue come and go."""
    recorder = Recorder()
    async with background(opened.consume(queue, recorder)):
        await eventually(lambda: is_published(opened, queue), within_seconds=10)
        await eventually(lambda: recorder.bodies)


async def test_an_event_reaches_the_queue_bound_to_its_type(opened: Broker, queue: str) -> None:
    created = events_pb2.TaskCreated(task_id="tsk_1", user_id="usr_1")
    seen: list[Delivery] = []

    async def keep(delivery: Delivery) -> None:
        seen.append(delivery)

    async def publish() -> bool:
        now = datetime.now(UTC)
        await opened.publish(event(created, source="task", subject="tsk_1", event_id="evt_1", occur_time=now))
        return True

    async with background(opened.consume(queue, keep, bindings=["atelier.task.v1.TaskCreated"])):
        await eventually(publish, within_seconds=10)
        await eventually(lambda: seen)

    assert (seen[0].type, seen[0].message_id) == ("atelier.task.v1.TaskCreated", "evt_1")
    assert seen[0].headers["cloudEvents:subject"] == "tsk_1"
    assert events_pb2.TaskCreated.FromString(seen[0].body) == created


async def test_a_message_that_no_queue_takes_is_an_error(opened: Broker, queue: str) -> None:
    with pytest.raises(MessageUnroutable) as refusal:
        await opened.publish(permit(queue))

    assert refusal.value.metadata == {"routing_key": queue}


async def test_the_consumers_of_a_queue_are_counted(opened: Broker, queue: str) -> None:
    nobody = await opened.consumers(queue)

    async def served(by: int) -> bool:
        return await opened.consumers(queue) == by

    async with background(opened.consume(queue, Recorder())), background(opened.consume(queue, Recorder())):
        await eventually(lambda: served(2), within_seconds=15)
    await eventually(lambda: served(0), within_seconds=15)

    assert nobody == 0


async def test_a_message_that_cannot_be_handled_is_set_aside_and_the_next_goes_on(
    opened: Broker, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    """R-03, with the redrive that follows."""
    recorder, tries, mended = Recorder(), 0, False

    async def fail_on_poison(delivery: Delivery) -> None:
        nonlocal tries
        if delivery.body == b"poison" and not mended:
            tries += 1
            raise ValueError("cannot be read")
        await recorder(delivery)

    await declare(opened, queue)
    await opened.publish(replace(permit(queue, b"poison"), message_id="evt_1", headers={"traceparent": TRACEPARENT}))
    await opened.publish(permit(queue, b"good"))
    async with background(opened.consume(queue, fail_on_poison)):

        async def set_aside() -> bool:
            return await opened.depth(f"{queue}.dead") == 1

        await eventually(set_aside, within_seconds=60)
        await eventually(lambda: recorder.bodies == [b"good"])
        assert tries == broker.DELIVERY_LIMIT + 1
        [said] = [record for record in caplog.records if record.getMessage() == "message set aside"]
        assert (said.queue, said.message_id, str(said.exc_info[1])) == (queue, "evt_1", "cannot be read")

        mended = True
        given_back = [letter async for letter in opened.redrive(queue)]
        await eventually(lambda: recorder.bodies == [b"good", b"poison"])

    again = recorder.deliveries[-1]
    assert [(letter.message_id, letter.body) for letter in given_back] == [("evt_1", b"poison")]
    assert (again.message_id, again.headers) == ("evt_1", {"traceparent": TRACEPARENT})
    assert await opened.depth(f"{queue}.dead") == 0
    assert [letter async for letter in opened.redrive(queue)] == []


async def test_a_dead_letter_that_cannot_be_given_back_stays_one(
    opened: Broker, node: rabbitmq.Node, queue: str
) -> None:
    await declare(opened, queue)
    await opened.publish(permit(f"{queue}.dead"))
    async with await aio_pika.connect(node.url) as connection, connection.channel() as channel:
        await channel.queue_delete(queue)

    async with broker.opened(node.url) as operator:
        with pytest.raises(MessageUnroutable):
            [letter async for letter in operator.redrive(queue)]

    async def there_again() -> bool:
        return await opened.depth(f"{queue}.dead") == 1

    await eventually(there_again, within_seconds=30)


async def test_a_dead_letter_is_given_back_once(opened: Broker, node: rabbitmq.Node, queue: str) -> None:
    async def redriven(body: bytes) -> list[bytes]:
        await opened.publish(permit(f"{queue}.dead", body))
        async with broker.opened(node.url) as operator:
            return [letter.body async for letter in operator.redrive(queue)]

    await declare(opened, queue)

    assert [await redriven(b"1"), await redriven(b"2")] == [[b"1"], [b"2"]]


async def test_messages_that_wait_are_handled_together_in_their_order(opened: Broker, queue: str) -> None:
    calls: list[list[bytes]] = []
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handle(deliveries: Sequence[Delivery]) -> None:
        calls.append([each.body for each in deliveries])
        begun.set()
        await go_on.wait()

    await declare(opened, queue)
    async with background(opened.consume_together(queue, handle, at_most=4)):
        await opened.publish(permit(queue, b"0"))
        await asyncio.wait_for(begun.wait(), 30)
        for number in range(1, 10):
            await opened.publish(permit(queue, str(number).encode()))
        await asyncio.sleep(5 * broker.LINGER_SECONDS)
        assert calls == [[b"0"]]  # one call at a time
        go_on.set()
        await eventually(lambda: sum(map(len, calls)) == 10, within_seconds=30)

        async def all_acknowledged() -> bool:
            return await opened.depth(queue) == 0

        await eventually(all_acknowledged, within_seconds=15)

    assert [body for call in calls for body in call] == [str(number).encode() for number in range(10)]
    assert calls[0] == [b"0"]
    assert max(map(len, calls)) in (3, 4)  # the first one is still with the consumer


async def test_messages_handled_together_are_all_acknowledged(opened: Broker, queue: str) -> None:
    first, next_one = Recorder(), Recorder()

    async def handle(deliveries: Sequence[Delivery]) -> None:
        for each in deliveries:
            await first(each)

    await declare(opened, queue)
    for number in range(3):
        await opened.publish(permit(queue, str(number).encode()))
    async with background(opened.consume_together(queue, handle, at_most=3)):
        await eventually(lambda: len(first.bodies) == 3, within_seconds=30)
    await opened.publish(permit(queue, b"next"))
    async with background(opened.consume(queue, next_one)):
        await eventually(lambda: b"next" in next_one.bodies, within_seconds=30)

    assert next_one.bodies == [b"next"]


async def test_a_message_waits_a_moment_for_those_that_follow(
    opened: Broker, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "LINGER_SECONDS", 5.0)
    calls: list[list[bytes]] = []

    async def handle(deliveries: Sequence[Delivery]) -> None:
        calls.append([each.body for each in deliveries])

    await declare(opened, queue)
    async with background(opened.consume_together(queue, handle, at_most=10)):
        for number in range(3):
            await opened.publish(permit(queue, str(number).encode()))
            await asyncio.sleep(0.1)
        await eventually(lambda: calls, within_seconds=30)

    assert calls == [[b"0", b"1", b"2"]]


async def test_what_waits_for_those_that_follow_when_its_consumer_stops_is_the_next_ones(
    opened: Broker, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()

    async def handle(deliveries: Sequence[Delivery]) -> None:
        for each in deliveries:
            await recorder(each)

    async def taken() -> bool:
        return await opened.depth(queue) == 0

    async def there_again() -> bool:
        return await opened.depth(queue) == 1

    await declare(opened, queue)
    await opened.publish(permit(queue))
    monkeypatch.setattr(broker, "LINGER_SECONDS", 600.0)
    async with background(opened.consume_together(queue, handle, at_most=10)):
        await eventually(taken, within_seconds=30)

    await eventually(there_again, within_seconds=30)
    assert recorder.bodies == []


async def test_of_messages_handled_together_one_that_cannot_be_stops_no_other(opened: Broker, queue: str) -> None:
    recorder = Recorder()

    async def handle(deliveries: Sequence[Delivery]) -> None:
        if b"poison" in [each.body for each in deliveries]:
            raise ValueError("cannot be read")
        for each in deliveries:
            await recorder(each)

    await declare(opened, queue)
    for body in (b"1", b"poison", b"2", b"3"):
        await opened.publish(permit(queue, body))
    async with background(opened.consume_together(queue, handle, at_most=10)):

        async def set_aside() -> bool:
            return (await opened.depth(f"{queue}.dead"), await opened.depth(queue)) == (1, 0)

        await eventually(set_aside, within_seconds=60)

    assert sorted(recorder.bodies) == [b"1", b"2", b"3"]


def created(number: int, body: bytes = b"") -> Message:
    task_id = f"tsk_{number}"
    payload = events_pb2.TaskCreated(task_id=task_id)
    told = event(payload, source="task", subject=task_id, event_id=f"{task_id}/1", occur_time=datetime.now(UTC))
    return replace(told, body=body or told.body, headers={**told.headers, "traceparent": TRACEPARENT})


async def test_events_that_were_published_together_arrive_as_what_they_are(opened: Broker, queue: str) -> None:
    recorder = Recorder()
    sent = [created(number) for number in range(3)]
    await declare(opened, queue)
    async with background(opened.consume(queue, recorder, bindings=["atelier.task.v1.TaskCreated"])):

        async def arrived() -> bool:
            await opened.publish(*sent)  # there are other queues for them before there is this one
            return len(recorder.deliveries) >= 3

        await eventually(arrived, within_seconds=10)

    assert recorder.deliveries[:3] == [
        Delivery(each.body, "atelier.task.v1.TaskCreated", each.message_id, each.headers) for each in sent
    ]


@pytest.mark.parametrize("at_most", [1, 10])  # with 1 it comes apart only once it is acknowledged
async def test_of_events_published_together_one_that_cannot_be_handled_is_set_aside_alone(
    opened: Broker, queue: str, at_most: int
) -> None:
    recorder = Recorder()

    async def handle(deliveries: Sequence[Delivery]) -> None:
        if b"poison" in [each.body for each in deliveries]:
            raise ValueError("cannot be read")
        for each in deliveries:
            await recorder(each)

    await declare(opened, queue)
    batch = events.batched([created(1), created(2, b"poison"), created(3)])
    await opened.publish(replace(batch, exchange="", routing_key=queue))
    async with background(opened.consume_together(queue, handle, at_most=at_most)):

        async def set_aside() -> bool:
            return (await opened.depth(f"{queue}.dead"), await opened.depth(queue)) == (1, 0)

        await eventually(set_aside, within_seconds=60)

    assert sorted(each.message_id for each in recorder.deliveries) == ["tsk_1/1", "tsk_3/1"]
    [letter] = [each async for each in opened.redrive(queue)]
    assert (letter.message_id, letter.body, letter.headers["traceparent"]) == ("tsk_2/1", b"poison", TRACEPARENT)


class Full(Broker):
    """Takes nothing in until it `has_room`."""

    has_room = False
    refused = 0

    async def publish(self, *messages: Message) -> None:
        if not self.has_room:
            self.refused += 1
            raise Unavailable("The message broker is away.")
        await super().publish(*messages)


async def test_events_that_came_together_are_not_lost_when_the_broker_does_not_take_them_one_by_one(
    opened: Broker, node: rabbitmq.Node, queue: str
) -> None:
    recorder, full = Recorder(), Full(node.url)

    async def handle(deliveries: Sequence[Delivery]) -> None:
        if b"poison" in [each.body for each in deliveries]:
            raise ValueError("cannot be read")
        for each in deliveries:
            await recorder(each)

    async def set_aside() -> bool:
        return await opened.depth(f"{queue}.dead") == 1

    await declare(opened, queue)
    batch = events.batched([created(1), created(2, b"poison"), created(3)])
    await opened.publish(replace(batch, exchange="", routing_key=queue))
    async with background(full.consume_together(queue, handle, at_most=10)):
        await eventually(lambda: full.refused, within_seconds=30)
        full.has_room = True
        await eventually(set_aside, within_seconds=60)
    await full.close()

    assert sorted(each.message_id for each in recorder.deliveries) == ["tsk_1/1", "tsk_3/1"]


@pytest.mark.parametrize("body", [b"[{", b"[1]"])
async def test_a_batch_that_is_none_is_set_aside(opened: Broker, queue: str, body: bytes) -> None:
    async def handle(deliveries: Sequence[Delivery]) -> None:
        raise ValueError(deliveries[0].body)

    await declare(opened, queue)
    await opened.publish(replace(permit(queue, body), content_type=events.BATCH))
    async with background(opened.consume_together(queue, handle, at_most=10)):

        async def set_aside() -> bool:
            return (await opened.depth(f"{queue}.dead"), await opened.depth(queue)) == (1, 0)

        await eventually(set_aside, within_seconds=60)


async def test_messages_handled_together_wait_together_and_come_again_when_they_were_not_acknowledged(
    opened: Broker, queue: str
) -> None:
    recorder, tries = Recorder(), 0

    async def away(_: Sequence[Delivery]) -> None:
        nonlocal tries
        tries += 1
        raise Unavailable("the database is away")

    async def handle(deliveries: Sequence[Delivery]) -> None:
        for each in deliveries:
            await recorder(each)

    await declare(opened, queue)
    for number in range(3):
        await opened.publish(permit(queue, str(number).encode()))
    async with background(opened.consume_together(queue, away, at_most=10)):
        await eventually(lambda: tries >= 3, within_seconds=30)
    async with background(opened.consume_together(queue, handle, at_most=10)):
        await eventually(lambda: sorted(recorder.bodies) == [b"0", b"1", b"2"], within_seconds=30)

    assert await opened.depth(f"{queue}.dead") == 0


async def test_what_is_redriven_says_so(
    opened: Broker, queue: str, node: rabbitmq.Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await declare(opened, queue)
    await opened.publish(replace(permit(f"{queue}.dead"), message_id="evt_2", headers={"traceparent": TRACEPARENT}))
    monkeypatch.setenv("ATELIER_BROKER_URL", node.url)

    code = await asyncio.to_thread(redrive.main, [queue])

    assert (code, await opened.depth(queue)) == (0, 1)
    assert capsys.readouterr().out.splitlines() == [
        f"evt_2  {queue}.dead  trace {TRACEPARENT.split('-')[1]}",
        f"1 messages are in {queue} again.",
    ]


@pytest.mark.parametrize("failure", [Unavailable, DeadlineExceeded, ResourceExhausted, Aborted])
async def test_a_message_waits_as_long_as_what_it_needs_is_unavailable(
    opened: Broker, queue: str, caplog: pytest.LogCaptureFixture, failure: type[MeshError]
) -> None:
    recorder = Recorder()
    recorder.failures = [failure("not now")] * 4
    await declare(opened, queue)

    await opened.publish(permit(queue))
    async with background(opened.consume(queue, recorder)):
        await eventually(lambda: recorder.bodies == [b"1"], within_seconds=20)

    assert (await opened.depth(queue), await opened.depth(f"{queue}.dead")) == (0, 0)
    assert "message not handled" not in caplog.text  # which would count, and set it aside in the end


async def test_a_message_that_waits_is_not_acknowledged_with_one_that_came_later(opened: Broker, queue: str) -> None:
    seen: list[bytes] = []

    async def handle(delivery: Delivery) -> None:
        seen.append(delivery.body)
        if delivery.body == b"waits":
            raise Unavailable("the database is away")

    async def there_again() -> bool:
        return await opened.depth(queue) == 1

    await declare(opened, queue)
    for body in (b"waits", b"done"):
        await opened.publish(permit(queue, body))
    async with background(opened.consume(queue, handle, prefetch=2)):
        await eventually(lambda: {*seen} == {b"waits", b"done"}, within_seconds=30)

    await eventually(there_again, within_seconds=30)


async def test_a_stopping_consumer_finishes_what_it_handles_and_leaves_the_rest(opened: Broker, queue: str) -> None:
    handling, finish, done = asyncio.Event(), asyncio.Event(), []

    async def handle(delivery: Delivery) -> None:
        handling.set()
        await finish.wait()
        for _ in range(10):  # it takes longer than to stop the consumer
            await opened.depth(queue)
        done.append(delivery.body)

    await declare(opened, queue)
    await opened.publish(permit(queue, b"first"))
    await opened.publish(permit(queue, b"second"))
    async with background(opened.consume(queue, handle)) as consumer:
        await handling.wait()
        consumer.cancel()
        finish.set()
        await asyncio.wait([consumer])
    recorder = Recorder()
    async with background(opened.consume(queue, recorder)):
        await eventually(lambda: recorder.bodies)

    assert (done, recorder.bodies) == ([b"first"], [b"second"])


async def test_a_deleted_queue_is_made_again(opened: Broker, node: rabbitmq.Node, queue: str) -> None:
    recorder = Recorder()

    async def arrives() -> bool:
        await opened.publish(permit(queue, b"after"))
        return b"after" in recorder.bodies

    async with background(opened.consume(queue, recorder)):
        await eventually(lambda: is_published(opened, queue), within_seconds=10)
        async with await aio_pika.connect(node.url) as connection, connection.channel() as channel:
            await channel.queue_delete(queue)

        await eventually(arrives, within_seconds=10)


async def test_the_depth_counts_what_waits_and_a_missing_queue_holds_nothing(opened: Broker, queue: str) -> None:
    missing = await opened.depth(queue)
    await declare(opened, queue)
    await opened.publish(permit(queue))

    async def counted() -> bool:
        return await opened.depth(queue) == 1

    assert missing == 0
    await eventually(counted)


@pytest.mark.parametrize("present", [True, False], ids=["present", "missing"])
async def test_a_question_that_is_asked_every_second_for_months_leaves_nothing_behind(
    opened: Broker, queue: str, present: bool
) -> None:
    if present:
        await declare(opened, queue)

    async def objects_after(questions: int) -> int:
        for _ in range(questions):
            await opened.consumers(queue)
        await asyncio.sleep(0.1)
        gc.collect()
        return len(gc.get_objects())

    before = await objects_after(20)

    assert await objects_after(100) - before < 100


async def test_a_broadcast_reaches_every_listener(opened: Broker, node: rabbitmq.Node, queue: str) -> None:
    heard: list[tuple[str, bytes]] = []

    async def listen(replica: str, client: Broker) -> None:
        async for body in client.listen(queue):
            heard.append((replica, body))  # noqa: PERF401 - a comprehension would tell only at its end

    async def both_heard() -> bool:
        await opened.broadcast(queue, b"tsk_1")
        return {("one", b"tsk_1"), ("two", b"tsk_1")} <= set(heard)

    async with (
        broker.opened(node.url) as other,
        background(listen("one", opened)),
        background(listen("two", other)),
    ):
        await eventually(both_heard, within_seconds=10)


async def test_without_a_broker_opening_works_and_asking_does_not() -> None:
    async with broker.opened("amqp://guest:guest@127.0.0.1:1/") as opened:
        for ask in (opened.check, lambda: opened.depth("q"), lambda: opened.publish(permit("q"))):
            with pytest.raises(Unavailable):
                await ask()
        await opened.broadcast("changes", b"nobody hears it")


async def test_a_killed_broker_loses_nothing_and_everybody_comes_back(
    opened: Broker, node: rabbitmq.Node, queue: str, url: str
) -> None:
    recorder, heard = Recorder(), asyncio.Event()

    async def listen() -> None:
        async for _ in opened.listen(f"{queue}.changes"):
            heard.set()

    async def is_heard() -> bool:
        await opened.broadcast(f"{queue}.changes", b"")
        return heard.is_set()

    async with database.opened(url) as kept:
        async with kept.transaction() as connection:
            await connection.run_sync(metadata.create_all)
        box = Outbox(kept, table)
        async with (
            background(box.relay(opened)),
            background(opened.consume(queue, recorder, prefetch=5)),
            background(listen()),
        ):
            await eventually(is_heard, within_seconds=10)
            # RabbitMQ notes a new quorum queue on disk only every half second; killed before, it never elects a
            # leader for it again (3.10.8). Nothing a client could do, so the queue is given that time.
            await asyncio.sleep(1.5)
            for number in range(300):
                async with kept.transaction() as connection:
                    await box.add(connection, permit(queue, str(number).encode()))
                if number == 100:
                    node.kill()
                    heard.clear()
                if number == 200:
                    with pytest.raises(Unavailable):
                        await opened.check()
                    await asyncio.to_thread(node.start)
            await eventually(lambda: len(set(recorder.bodies)) == 300, within_seconds=30)
            await eventually(is_heard, within_seconds=10)
            await opened.check()

            async def is_empty() -> bool:
                async with kept.reading() as connection:
                    return await connection.scalar(select(func.count()).select_from(table)) == 0

            await eventually(is_empty)

    assert set(recorder.bodies) == {str(number).encode() for number in range(300)}
