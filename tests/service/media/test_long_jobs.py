"""R-15: jobs that take longer than the broker waits for an acknowledgement are done once."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from mesh import broker
from mesh.broker import Broker, Delivery
from mesh.outbox import Message
from services.media.worker.tasks import QUEUES
from tests import rabbitmq
from tests.eventually import eventually
from tests.service.media.conftest import Start

# For jobs of three times that: with 60 a minute for one of three.
PATIENCE_SECONDS = float(os.environ.get("ATELIER_TEST_PATIENCE_SECONDS", "2"))
JOB_SECONDS = 3 * PATIENCE_SECONDS
WITHIN_SECONDS = 30 + 3 * JOB_SECONDS

pytestmark = pytest.mark.timeout(90 + 6 * JOB_SECONDS)


class Counted:
    """A real broker; counts what it delivers."""

    def __init__(self, bus: Broker) -> None:
        self.bus = bus
        self.deliveries = 0

    async def consume(self, queue: str, handler: Callable[[Delivery], Awaitable[None]], *, prefetch: int) -> None:
        async def counted(delivery: Delivery) -> None:
            self.deliveries += 1
            await handler(delivery)

        await self.bus.consume(queue, counted, prefetch=prefetch)

    async def publish(self) -> bool:
        """Publish a permit; `eventually` tries again while there is no queue for it."""
        await self.bus.publish(Message("", QUEUES["cpu"], b"", "prm_1"))
        return True


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rabbitmq.Node]:
    with rabbitmq.running(tmp_path_factory.mktemp("rabbitmq"), patience_seconds=PATIENCE_SECONDS) as node:
        yield node


@pytest.fixture
async def permits(node: rabbitmq.Node) -> AsyncIterator[Counted]:
    async with broker.opened(node.url) as bus:
        yield Counted(bus)


async def test_a_job_longer_than_the_brokers_patience_is_done_once(
    start: Start, permits: Counted, record_property: Callable[[str, object], None]
):
    world = await start(slots=2)
    world.storage.delay_seconds = JOB_SECONDS
    task_id, began = world.tasks.queue(), time.monotonic()

    await eventually(permits.publish, within_seconds=20)
    await eventually(lambda: task_id in world.tasks.completed, WITHIN_SECONDS)

    took = time.monotonic() - began
    assert took > JOB_SECONDS
    assert (permits.deliveries, world.tasks.claims, world.tasks.failed) == (1, 1, {})  # nothing more was there to claim
    assert await permits.bus.depth(QUEUES["cpu"]) == 0
    record_property(
        "R-15", f"the broker's patience {PATIENCE_SECONDS:.0f} s, a job of {took:.0f} s: one delivery, one claim"
    )


async def test_a_permit_that_is_taken_back_while_it_waits_for_a_slot_costs_nothing(start: Start, permits: Counted):
    world = await start(slots=1)
    world.storage.delay_seconds = JOB_SECONDS
    long, waiting = world.tasks.queue(), world.tasks.queue()

    await eventually(permits.publish, within_seconds=20)
    await eventually(permits.publish, within_seconds=20)
    await eventually(lambda: {long, waiting} <= set(world.tasks.completed), WITHIN_SECONDS)

    await eventually(lambda: permits.deliveries > 2, within_seconds=30)  # the broker's patience was at an end
    assert world.tasks.failed == {}
