"""Confirms results by what happens to tasks: the queue `storage.events`."""

from __future__ import annotations

from functools import partial

from atelier.task.v1 import events_pb2

from mesh.broker import Broker, Delivery
from mesh.service import Background
from services.storage.domain import Files

QUEUE = "storage.events"
BINDINGS = (events_pb2.TaskSucceeded.DESCRIPTOR.full_name,)


class TaskEvents:
    """Takes each event once."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def work(self, broker: Broker) -> list[Background]:
        """Return what must run for ever."""
        return [partial(broker.consume, QUEUE, self.take, prefetch=20, bindings=BINDINGS)]

    async def take(self, delivery: Delivery) -> None:
        event = events_pb2.TaskSucceeded.FromString(delivery.body)
        await self._files.confirm(event.task_id, event.output_file_ids, delivery.message_id)
