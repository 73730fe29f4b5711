"""Settles quota by what happens to tasks: the queue `user.events`."""

from __future__ import annotations

from functools import partial

from atelier.task.v1 import events_pb2

from mesh.broker import Broker, Delivery
from mesh.clock import Clock
from mesh.service import Background
from services.user.domain import Quotas, State

QUEUE = "user.events"

Event = events_pb2.TaskCreated | events_pb2.TaskSucceeded | events_pb2.TaskFailed | events_pb2.TaskCancelled

_EFFECTS: dict[str, tuple[type[Event], State]] = {
    event.DESCRIPTOR.full_name: (event, state)
    for event, state in (
        (events_pb2.TaskCreated, State.BOUND),
        (events_pb2.TaskSucceeded, State.SETTLED),
        (events_pb2.TaskFailed, State.RELEASED),
        (events_pb2.TaskCancelled, State.RELEASED),
    )
}
BINDINGS = tuple(_EFFECTS)


class TaskEvents:
    """Takes each event once, whatever the order they arrive in."""

    def __init__(self, quotas: Quotas, clock: Clock) -> None:
        self._quotas = quotas
        self._clock = clock

    def work(self, broker: Broker) -> list[Background]:
        """Return what must run for ever."""
        return [partial(broker.consume, QUEUE, self.take, prefetch=20, bindings=BINDINGS)]

    async def take(self, delivery: Delivery) -> None:
        event_type, state = _EFFECTS[delivery.type]
        event = event_type.FromString(delivery.body)
        await self._quotas.follow(delivery.message_id, event.reservation_id, state, self._clock.now())
