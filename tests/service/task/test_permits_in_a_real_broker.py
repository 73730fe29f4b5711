"""Permits on RabbitMQ itself: they reach a worker by the outbox, and come again when the broker has forgotten them."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta

import pytest

from mesh import broker, outbox
from mesh.broker import Broker
from services.task.upkeep import Upkeep
from tests import rabbitmq
from tests.eventually import eventually
from tests.service.task.conftest import BRISK, Replica


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rabbitmq.Node]:
    with rabbitmq.running(tmp_path_factory.mktemp("rabbitmq")) as node:
        yield node


@asynccontextmanager
async def working(replica: Replica, bus: Broker) -> AsyncIterator[list[str]]:
    """Claim a task for every permit, as a media worker does."""
    claimed: list[str] = []

    async def take(_: broker.Delivery) -> None:
        assignment = await replica.claim()
        if assignment:
            claimed.append(assignment.task.task_id)

    consumer = asyncio.create_task(bus.consume("media.cpu", take))
    yield claimed
    consumer.cancel()
    await asyncio.gather(consumer, return_exceptions=True)


async def test_each_created_task_lets_a_worker_claim(replica: Replica, node: rabbitmq.Node):
    async with broker.opened(node.url) as bus, working(replica, bus) as claimed:
        await eventually(lambda: declared(bus), within_seconds=20)
        relay = asyncio.create_task(replica.outbox.relay(bus))
        created = [(await replica.create()).task_id for _ in range(3)]

        await eventually(lambda: len(claimed) == 3, within_seconds=20)
        relay.cancel()

    assert sorted(claimed) == sorted(created)


async def test_tasks_whose_permits_are_lost_get_new_ones(replica: Replica, node: rabbitmq.Node):
    async with broker.opened(node.url) as bus, working(replica, bus) as claimed:
        await eventually(lambda: declared(bus), within_seconds=20)
        created = [(await replica.create()).task_id for _ in range(3)]  # no relay: their own never arrive

        await Upkeep(replica.tasks, bus, lambda: BRISK, permit_grace=timedelta(0)).replenish()

        await eventually(lambda: len(claimed) == 3, within_seconds=20)

    assert sorted(claimed) == sorted(created)


async def declared(bus: Broker) -> bool:
    """Tell whether the worker has made the queue: until then nothing can be published to it."""
    await bus.publish(outbox.Message("", "media.cpu", b"", "probe"))
    return True
