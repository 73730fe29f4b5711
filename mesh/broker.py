"""RabbitMQ: confirmed publishing, durable queues with dead letters, broadcasts to all replicas.

Opening never fails and nothing here ends when the broker goes away: what needs an answer raises
Unavailable, what runs for ever waits and goes on. What must not be lost goes through `mesh.outbox`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import cast

import aio_pika
import pamqp.exceptions
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import (
    AMQPError,
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    DeliveryError,
    PublishError,
)
from opentelemetry import context as trace_context
from opentelemetry import propagate
from yarl import URL

from mesh import events
from mesh.errors import Aborted, DeadlineExceeded, ResourceExhausted, Unavailable
from mesh.events import EXCHANGE as EVENTS
from mesh.outbox import Message, MessageUnroutable

log = logging.getLogger(__name__)

DEAD_LETTERS = "atelier.dead"
DELIVERY_LIMIT = 10  # with the backoff below a message that no handler can take is set aside after about ten seconds
CONNECT_SECONDS = 5.0
PUBLISH_SECONDS = 5.0
BROADCAST_SECONDS = 1.0  # somebody's request waits for it, and it may be lost
RECONNECT_SECONDS = 1.0
FINISH_SECONDS = 10.0
# Before messages are handled together, for those that follow; and until the outbox's round that sent them is over: all
# that it sets off at the same time would have those wait longer who wait for an answer.
LINGER_SECONDS = 0.12
HEARTBEAT_SECONDS = 15  # a broker that hangs is noticed within two of them
MAX_BACKOFF_SECONDS = 2.0
BROADCAST_BACKLOG = 10_000  # broadcasts only hurry a poll, so a listener that is late loses the oldest

# What aio-pika raises when the broker is not there; TimeoutError is an OSError.
_AWAY = (AMQPError, OSError, ChannelInvalidStateError, pamqp.exceptions.PAMQPException)
# Not the message's fault: it is kept and tried again for as long as it takes.
_TRANSIENT = (Unavailable, DeadlineExceeded, ResourceExhausted, Aborted)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as its consumer sees it. `type` is the event's type, or the routing key of what is no event."""

    body: bytes
    type: str
    message_id: str
    headers: Mapping[str, str]


Handler = Callable[[Delivery], Awaitable[None]]
BatchHandler = Callable[[Sequence[Delivery]], Awaitable[None]]
"""Handles messages together: all or none."""


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Broker]:
    """Hold a broker at an `amqp://` URL; its first use connects."""
    broker = Broker(url)
    try:
        yield broker
    finally:
        await broker.close()


class Broker:
    """A client of one broker."""

    def __init__(self, url: str) -> None:
        # Two connections: a broker short of memory stops reading from those that publish, and acks must get through.
        self._publishing = _Link(url)
        self._consuming = _Link(url)
        self._channel_opening = asyncio.Lock()
        # Strong references: aio-pika holds channels weakly.
        self._confirmed: AbstractChannel | None = None
        self._unconfirmed: AbstractChannel | None = None
        self._broadcasts: dict[str, AbstractExchange] = {}

    async def close(self) -> None:
        await self._publishing.close()
        await self._consuming.close()

    async def check(self) -> None:
        """Raise Unavailable unless the broker answers: a dependency of `mesh.service.serve`."""
        with _unavailable():
            async with asyncio.timeout(CONNECT_SECONDS):
                channel = await self._confirmed_channel()
                await channel.declare_exchange(EVENTS, aio_pika.ExchangeType.TOPIC, durable=True)

    async def publish(self, *messages: Message) -> None:
        """Return once the broker has messages, events of one type if they are several, on disk.

        Satisfies `mesh.outbox.Publisher`.

        Raises:
            MessageUnroutable: no queue takes it.
            Unavailable: the broker is away, or did not confirm in time; it may have the message nevertheless.
        """
        message = messages[0] if len(messages) == 1 else events.batched(messages)
        try:
            with _unavailable():
                async with asyncio.timeout(PUBLISH_SECONDS):
                    channel = await self._confirmed_channel()
                    exchange = channel.default_exchange
                    if message.exchange:
                        exchange = await channel.get_exchange(message.exchange, ensure=False)
                    await exchange.publish(
                        aio_pika.Message(
                            message.body,
                            headers=dict(message.headers),
                            content_type=message.content_type,
                            message_id=message.message_id,
                            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                        ),
                        message.routing_key,
                        mandatory=True,
                    )
        except PublishError:
            raise MessageUnroutable(
                f"No queue takes {message.routing_key} yet.", metadata={"routing_key": message.routing_key}
            ) from None

    async def consume(self, queue: str, handler: Handler, *, prefetch: int = 1, bindings: Sequence[str] = ()) -> None:
        """Hand every message of a durable queue to `handler`, for ever: a background of `mesh.service.serve`.

        A message is acknowledged when the handler returns. When it raises that something is unavailable the message is
        tried again for as long as it takes; after any other failure up to DELIVERY_LIMIT times, then it goes to
        `<queue>.dead`. A handler may see a message twice. Cancelling finishes the handlers in flight first.

        Args:
            queue: its name; the queue is declared.
            handler: called for up to `prefetch` messages at a time.
            prefetch: 1 keeps the order.
            bindings: types of events that the queue wants.
        """

        async def handle(deliveries: Sequence[Delivery]) -> None:
            for delivery in deliveries:  # one, or those that came as one message
                await handler(delivery)

        await self._consume(queue, handle, prefetch, bindings, together=False)

    async def consume_together(
        self, queue: str, handler: BatchHandler, *, at_most: int, bindings: Sequence[str] = ()
    ) -> None:
        """As `consume`, but for all that waits, in one call; one call at a time, with about `at_most` at most.

        It lingers before each, unless as much waits as one takes: what comes meanwhile goes with it.
        When that fails for good each of them is tried by itself, so that one which cannot be handled stops no other.
        """
        await self._consume(queue, handler, at_most, bindings, together=True)

    async def _consume(
        self, queue: str, handler: BatchHandler, prefetch: int, bindings: Sequence[str], *, together: bool
    ) -> None:
        while True:
            try:
                with _unavailable():
                    await self._consume_until_lost(queue, handler, prefetch, bindings, together=together)
                log.warning("consumer lost the broker", extra={"queue": queue})
            except Unavailable as failure:
                log.warning("consumer waits", extra={"queue": queue, "failure": repr(failure.__cause__ or failure)})
            await asyncio.sleep(_jittered(RECONNECT_SECONDS))

    async def redrive(self, queue: str) -> AsyncIterator[Delivery]:
        """Give the dead letters that `queue` has now back to it, oldest first; yield each once it is there.

        A letter may come twice when this dies half-way.

        Raises:
            Unavailable: the broker is away; what was not yielded is a dead letter still, or again.
        """
        name = f"{queue}.dead"
        for _ in range(await self.depth(name)):
            with _unavailable():
                async with asyncio.timeout(CONNECT_SECONDS):
                    dead = await (await self._confirmed_channel()).get_queue(name, ensure=False)
                    letter = await dead.get(fail=False)
            if letter is None:
                return  # somebody else redrives, too
            delivery = _deliveries(letter)[0]
            own = {key: value for key, value in delivery.headers.items() if not key.startswith("x-")}  # the broker's
            await self.publish(Message("", queue, letter.body, delivery.message_id, own, letter.content_type or ""))
            with _unavailable():
                await letter.ack()
            yield delivery

    async def depth(self, queue: str) -> int:
        """Return how many messages wait in a queue, those being handled not counted; 0 when there is no such queue."""
        return (await self._counts(queue))[0]

    async def consumers(self, queue: str) -> int:
        """Return how many consumers a queue has; 0 when there is no such queue."""
        return (await self._counts(queue))[1]

    async def broadcast(self, name: str, body: bytes) -> None:
        """Tell all present listeners of `name`; when the broker is away nobody is told and nothing is raised."""
        try:
            with _unavailable():
                async with asyncio.timeout(BROADCAST_SECONDS):
                    exchange = await self._broadcast_exchange(name)
                    await exchange.publish(aio_pika.Message(body), "", mandatory=False)
        except Unavailable as failure:
            log.debug("broadcast dropped", extra={"broadcast": name, "failure": failure.message})

    async def listen(self, name: str) -> AsyncIterator[bytes]:
        """Yield what is broadcast to `name` from now on, for ever; some is missed while the broker is away."""
        while True:
            with suppress(*_AWAY, Unavailable):
                connection = await self._consuming.connection()
                async with connection.channel(publisher_confirms=False) as channel:
                    exchange = await _declared_broadcast(channel, name)
                    queue = await channel.declare_queue(
                        exclusive=True, auto_delete=True, arguments={"x-max-length": BROADCAST_BACKLOG}
                    )
                    await queue.bind(exchange)
                    async with queue.iterator(no_ack=True) as messages:
                        async for message in messages:
                            yield message.body
            await asyncio.sleep(_jittered(RECONNECT_SECONDS))

    async def _counts(self, queue: str) -> tuple[int, int]:
        """Return how many messages wait in a queue, and how many consumers it has."""
        with _unavailable():
            async with asyncio.timeout(CONNECT_SECONDS):
                connection = await self._publishing.connection()
                transport = connection.transport
                if transport is None:
                    raise ConnectionError("the connection has just been closed")
                await transport.ready()  # while the broker takes nothing, channels would pile up
                # A channel of its own: asking for a queue that is missing closes it. Of aiormq: each one of aio-pika's
                # (10.2) leaves 31 objects with its connection, for as long as that lasts.
                channel = await transport.connection.channel(publisher_confirms=False)
                try:
                    found = await channel.queue_declare(queue, passive=True)
                except ChannelNotFoundEntity:
                    return 0, 0
                finally:
                    await channel.close()
                return found.message_count or 0, found.consumer_count or 0

    async def _confirmed_channel(self) -> AbstractChannel:
        async with self._channel_opening:
            if self._confirmed is None or self._confirmed.is_closed:
                connection = await self._publishing.connection()
                channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
                # Publishing to an exchange that is missing would close the channel under every other publisher.
                await channel.declare_exchange(EVENTS, aio_pika.ExchangeType.TOPIC, durable=True)
                self._confirmed = channel
            return self._confirmed

    async def _broadcast_exchange(self, name: str) -> AbstractExchange:
        async with self._channel_opening:
            if self._unconfirmed is None or self._unconfirmed.is_closed:
                connection = await self._publishing.connection()
                self._unconfirmed = await connection.channel(publisher_confirms=False)
                self._broadcasts = {}
            if name not in self._broadcasts:
                self._broadcasts[name] = await _declared_broadcast(self._unconfirmed, name)
            return self._broadcasts[name]

    async def _consume_until_lost(
        self, name: str, handler: BatchHandler, prefetch: int, bindings: Sequence[str], *, together: bool
    ) -> None:
        stopping, lost = asyncio.Event(), asyncio.Event()
        handling: set[asyncio.Task[None]] = set()
        waiting: deque[_Received] = deque()

        async def handle() -> None:
            try:
                while waiting and not stopping.is_set():
                    few = sum(len(each.deliveries) for each in waiting) < prefetch
                    if together and few and await _set_within(stopping, LINGER_SECONDS):
                        break
                    taken = [waiting.popleft()]
                    while together and waiting and sum(len(each.deliveries) for each in taken) < prefetch:
                        taken.append(waiting.popleft())
                    await self._handle(name, taken, handler, stopping)
            finally:
                handling.discard(cast("asyncio.Task[None]", asyncio.current_task()))

        async def received(message: AbstractIncomingMessage) -> None:
            waiting.append(_Received(message, _deliveries(message)))
            if not together or not handling:
                handling.add(asyncio.create_task(handle()))

        connection = await self._consuming.connection()
        async with asyncio.timeout(CONNECT_SECONDS):
            channel = await connection.channel(publisher_confirms=False)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await channel.set_qos(prefetch_count=prefetch)
                channel.close_callbacks.add(lambda *_: lost.set())
                # The queue can go without its channel, when somebody deletes it: then it is made again.
                (await channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(lambda _: lost.set())
                queue = await _declared_queue(channel, name, bindings)
                tag = await queue.consume(received)
            try:
                await lost.wait()
            finally:
                # Lost, or told to stop: take nothing new, let what is being handled end and be acknowledged. What only
                # waits to be tried again goes back to the queue when the channel closes.
                stopping.set()
                with suppress(*_AWAY):
                    async with asyncio.timeout(CONNECT_SECONDS):
                        await queue.cancel(tag)
                if handling:
                    await asyncio.wait(handling, timeout=FINISH_SECONDS)
        finally:
            for task in handling:
                task.cancel()
            with suppress(*_AWAY):
                async with asyncio.timeout(CONNECT_SECONDS):
                    await channel.close()

    async def _handle(
        self, queue: str, received: Sequence[_Received], handler: BatchHandler, stopping: asyncio.Event
    ) -> None:
        deliveries = [delivery for each in received for delivery in each.deliveries]
        first, last = deliveries[0], received[-1].message
        alone = len(deliveries) == 1
        # This task's own context: nothing to detach. What belongs to several traces is logged for none.
        trace_context.attach(propagate.extract(first.headers if alone else {}, context=trace_context.Context()))
        tries = 0
        while True:
            try:
                await handler(deliveries)
            except _TRANSIENT as failure:
                tries += 1
                log.warning("message waits", extra=_described(first) | {"failure": failure.message})
                if await _set_within(stopping, _backoff_seconds(tries)):
                    return  # unacknowledged: closing the channel gives it to another consumer
            except Exception:
                if len(received) > 1:
                    for each in received:
                        await self._handle(queue, [each], handler, stopping)
                elif not alone and await self._taken_apart(queue, received[0]):
                    pass  # each comes again by itself
                else:
                    count = _delivery_count(last)
                    said = "message set aside" if count >= DELIVERY_LIMIT else "message not handled"
                    log.exception(said, extra=_described(first) | {"queue": queue, "deliveries": count})
                    await _set_within(stopping, _backoff_seconds(count))
                    with suppress(*_AWAY):
                        await last.nack(requeue=True)  # the broker sets it aside after DELIVERY_LIMIT
                return
            else:
                with suppress(*_AWAY):  # lost meanwhile: it comes again, and the handler has seen it before
                    # Those before the last one are with it, or were acknowledged earlier.
                    await last.ack(multiple=len(received) > 1)
                return

    async def _taken_apart(self, queue: str, received: _Received) -> bool:
        """Put the events of a batch back into the queue one by one, so that what is wrong with one stops no other."""
        try:
            for each in events.unbatched(received.message.body):
                await self.publish(replace(each, exchange="", routing_key=queue))
        except Unavailable:
            return False
        with suppress(*_AWAY):
            await received.message.ack()
        return True


@dataclass(frozen=True, slots=True)
class _Received:
    """A message, and what it delivers."""

    message: AbstractIncomingMessage
    deliveries: Sequence[Delivery]


class _Link:
    """One connection, opened when first needed and again after it was lost."""

    def __init__(self, url: str) -> None:
        self._url = URL(url).update_query(heartbeat=str(HEARTBEAT_SECONDS))
        self._opening = asyncio.Lock()
        self._connection: AbstractConnection | None = None
        self._closed = False
        self._not_before = 0.0  # time.monotonic(); a hundred waiting callers must not try a hundred times

    async def connection(self) -> AbstractConnection:
        async with self._opening:
            if self._connection is not None and self._connection.connected.is_set():
                return self._connection
            if self._closed or time.monotonic() < self._not_before:
                raise Unavailable("The message broker is away.", retry_after_seconds=RECONNECT_SECONDS)
            self._not_before = time.monotonic() + _jittered(RECONNECT_SECONDS)
            with _unavailable():
                async with asyncio.timeout(CONNECT_SECONDS):
                    self._connection = await aio_pika.connect(self._url)
            self._not_before = 0.0
            return self._connection

    async def close(self) -> None:
        self._closed = True
        if self._connection is not None:
            with suppress(*_AWAY):
                await self._connection.close()


def _deliveries(message: AbstractIncomingMessage) -> list[Delivery]:
    if message.content_type == events.BATCH:
        with suppress(Exception):  # what is no batch, in whatever way, its handler refuses
            return [
                Delivery(body=each.body, type=each.routing_key, message_id=each.message_id, headers=each.headers)
                for each in events.unbatched(message.body)
            ]
    headers = {key: value for key, value in message.headers.items() if isinstance(value, str)}
    kind = headers.get("cloudEvents:type", message.routing_key or "")
    return [Delivery(body=message.body, type=kind, message_id=message.message_id or "", headers=headers)]


async def _declared_queue(channel: AbstractChannel, name: str, bindings: Sequence[str]) -> AbstractQueue:
    dead_letters = await channel.declare_exchange(DEAD_LETTERS, aio_pika.ExchangeType.DIRECT, durable=True)
    dead = await channel.declare_queue(f"{name}.dead", durable=True, arguments={"x-queue-type": "quorum"})
    await dead.bind(dead_letters, name)
    queue = await channel.declare_queue(
        name,
        durable=True,
        arguments={
            "x-queue-type": "quorum",
            "x-delivery-limit": DELIVERY_LIMIT,
            "x-dead-letter-exchange": DEAD_LETTERS,
            "x-dead-letter-routing-key": name,
            # Moved only once the dead queue has it; the broker demands this overflow for that.
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
    )
    if bindings:
        events = await channel.declare_exchange(EVENTS, aio_pika.ExchangeType.TOPIC, durable=True)
        for event_type in bindings:
            await queue.bind(events, event_type)
    return queue


async def _declared_broadcast(channel: AbstractChannel, name: str) -> AbstractExchange:
    return await channel.declare_exchange(name, aio_pika.ExchangeType.FANOUT)


@contextmanager
def _unavailable() -> Iterator[None]:
    """Turn what aio-pika raises into Unavailable; a message that came back is the caller's to judge."""
    try:
        yield
    except PublishError:
        raise
    except DeliveryError as failure:
        raise Unavailable("The message broker refused a message for now.") from failure
    except _AWAY as failure:
        raise Unavailable("The message broker is away.", retry_after_seconds=RECONNECT_SECONDS) from failure


async def _set_within(happened: asyncio.Event, seconds: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await happened.wait()
    return happened.is_set()


def _backoff_seconds(tries: int) -> float:
    return min(_jittered(0.05 * 2 ** min(tries, 10)), MAX_BACKOFF_SECONDS)


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.5, 1.5)  # noqa: S311 - spreads replicas out, keeps no secret


def _delivery_count(message: AbstractIncomingMessage) -> int:
    count = message.headers.get("x-delivery-count", 0)
    return count if isinstance(count, int) else 0


def _described(delivery: Delivery) -> dict[str, str]:
    return {"message_id": delivery.message_id, "message_type": delivery.type}
