from __future__ import annotations

import contextvars
import json
from base64 import b64encode
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from atelier.task.v1 import events_pb2
from sqlalchemy.dialects import sqlite

from mesh import context, database
from mesh.context import Request
from mesh.database import DatabaseNotSupported, Timestamp
from mesh.events import batched, event, unbatched
from mesh.outbox import Message

NOW = datetime(2026, 1, 2, tzinfo=UTC)
SUCCEEDED = events_pb2.TaskSucceeded(task_id="tsk_1", user_id="usr_1")


def test_an_event_is_a_cloud_event_in_binary_mode() -> None:
    message = event(SUCCEEDED, source="task", subject="tsk_1", event_id="evt_1", occur_time=NOW)

    assert message.headers == {
        "cloudEvents:specversion": "1.0",
        "cloudEvents:id": "evt_1",
        "cloudEvents:source": "task",
        "cloudEvents:type": "atelier.task.v1.TaskSucceeded",
        "cloudEvents:subject": "tsk_1",
        "cloudEvents:time": "2026-01-02T00:00:00+00:00",
    }
    assert (message.exchange, message.routing_key) == ("atelier.events", "atelier.task.v1.TaskSucceeded")
    assert (message.content_type, message.message_id, message.subject) == ("application/protobuf", "evt_1", "tsk_1")
    assert events_pb2.TaskSucceeded.FromString(message.body) == SUCCEEDED


def test_several_events_are_a_cloud_events_batch_and_come_out_as_they_went_in() -> None:
    messages = [
        event(SUCCEEDED, source="task", subject=subject, event_id=f"{subject}/1", occur_time=NOW)
        for subject in ("tsk_1", "tsk_2")
    ]
    messages[1] = replace(messages[1], headers={**messages[1].headers, "traceparent": "00-1-2-01"})

    batch = batched(messages)

    assert (batch.exchange, batch.routing_key) == (messages[0].exchange, messages[0].routing_key)
    assert batch.content_type == "application/cloudevents-batch+json"
    assert json.loads(batch.body)[1] == {
        "specversion": "1.0",
        "id": "tsk_2/1",
        "source": "task",
        "type": "atelier.task.v1.TaskSucceeded",
        "subject": "tsk_2",
        "time": "2026-01-02T00:00:00+00:00",
        "traceparent": "00-1-2-01",
        "datacontenttype": "application/protobuf",
        "data_base64": b64encode(messages[1].body).decode(),
    }
    assert list(unbatched(batch.body)) == messages


def test_an_event_names_the_request_that_caused_it() -> None:
    request = Request(caller="edge", user=None, request_id="req_1", deadline=0, metadata={})

    def serve() -> Message:
        context.serve(request)
        return event(SUCCEEDED, source="task", subject="tsk_1", event_id="evt_1", occur_time=NOW)

    message = contextvars.copy_context().run(serve)

    assert message.headers["correlationid"] == "req_1"


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="zone"):
        Timestamp().process_bind_param(datetime(2026, 1, 2), sqlite.dialect())  # noqa: DTZ001 - the mistake itself


@pytest.mark.parametrize(
    "url",
    [
        "mysql+aiomysql://user:secret@host/task",
        "postgresql+asyncpg://user:secret@host/task",
        "postgresql+psycopg://user:secret@host",
        "user:secret@host",
        "sqlite+aiosqlite:///:memory:",
    ],
)
def test_a_database_that_cannot_be_shared_by_replicas_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(DatabaseNotSupported) as refusal:
        database.require_supported(url)

    assert "secret" not in f"{refusal.value.message}{refusal.value.metadata}"
