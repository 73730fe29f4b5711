"""Settles quota by what happens to tasks: the queue `user.events`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from atelier.task.v1 import events_pb2

from mesh.broker import Broker, Delivery
from mesh.clock import Clock
from mesh.service import Background
from services.user.domain import Outcome, Quotas, State

QUEUE = "user.events"
TOGETHER = 100  # events in one transaction

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
        return [partial(broker.consume_together, QUEUE, self.take, at_most=TOGETHER, bindings=BINDINGS)]

    async def take(self, deliveries: Sequence[Delivery]) -> None:
        await self._quotas.follow([_outcome(each) for each in deliveries], self._clock.now())


def _outcome(delivery: Delivery) -> Outcome:
    event_type, state = _EFFECTS[delivery.type]
    return Outcome(delivery.message_id, event_type.FromString(delivery.body).reservation_id, state)
