"""Confirms results by what happens to tasks: the queue `storage.events`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from atelier.task.v1 import events_pb2

from mesh.broker import Broker, Delivery
from mesh.service import Background
from services.storage.domain import Files

QUEUE = "storage.events"
TOGETHER = 100  # events in one transaction
BINDINGS = (events_pb2.TaskSucceeded.DESCRIPTOR.full_name,)


class TaskEvents:
    """Takes each event once."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def work(self, broker: Broker) -> list[Background]:
        """Return what must run for ever."""
        return [partial(broker.consume_together, QUEUE, self.take, at_most=TOGETHER, bindings=BINDINGS)]

    async def take(self, deliveries: Sequence[Delivery]) -> None:
        events = {each.message_id: events_pb2.TaskSucceeded.FromString(each.body) for each in deliveries}
        results = {
            key: [(event.task_id, file_id) for file_id in event.output_file_ids] for key, event in events.items()
        }
        await self._files.follow(results)
