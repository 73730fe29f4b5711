"""Events on the broker, as CloudEvents 1.0 with a protobuf payload: one in binary mode, several as a JSON batch.

Source: CloudEvents AMQP protocol binding 1.0.2, section 3.1, and JSON event format 1.0.2, section 4; the trace context
is W3C's for AMQP.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from datetime import datetime

from google.protobuf.message import Message as Payload
from opentelemetry import propagate

from mesh import context
from mesh.outbox import Message

EXCHANGE = "atelier.events"
BATCH = "application/cloudevents-batch+json"
_PREFIX = "cloudEvents:"
# Of the specification; what else a header says, an extension does.
_ATTRIBUTES = ("specversion", "id", "source", "type", "subject", "time")


def event(payload: Payload, *, source: str, subject: str, event_id: str, occur_time: datetime) -> Message:
    """Return the message that tells everyone `payload`, to be put into an outbox.

    Args:
        payload: its full name is the event's type and its routing key.
        source: the service that tells it.
        subject: the id of what it happened to; one subject's events arrive in order.
        event_id: consumers take an event once by it.
        occur_time: when it happened, aware.
    """
    kind = payload.DESCRIPTOR.full_name
    headers = {
        "cloudEvents:specversion": "1.0",
        "cloudEvents:id": event_id,
        "cloudEvents:source": source,
        "cloudEvents:type": kind,
        "cloudEvents:subject": subject,
        "cloudEvents:time": occur_time.isoformat(),
    }
    propagate.inject(headers)  # traceparent, when there is a trace
    request = context.present()
    if request is not None:
        headers["correlationid"] = request.request_id
    return Message(
        exchange=EXCHANGE,
        routing_key=kind,
        body=payload.SerializeToString(),
        message_id=event_id,
        headers=headers,
        subject=subject,
    )


def batched(messages: Sequence[Message]) -> Message:
    """Return one message that tells several events of one type; `unbatched` takes it apart."""
    told = [
        {key.removeprefix(_PREFIX): value for key, value in each.headers.items()}
        | {"datacontenttype": each.content_type, "data_base64": b64encode(each.body).decode()}
        for each in messages
    ]
    first = messages[0]
    return Message(
        exchange=first.exchange,
        routing_key=first.routing_key,
        body=json.dumps(told, separators=(",", ":")).encode(),
        message_id=first.message_id,
        content_type=BATCH,
    )


def unbatched(body: bytes) -> Iterator[Message]:
    """Yield the events of a batch, each as the message that it would have been by itself.

    Raises:
        ValueError, KeyError: it is none.
    """
    for each in json.loads(body):
        content_type, data = each.pop("datacontenttype"), b64decode(each.pop("data_base64"))
        headers = {_PREFIX + key if key in _ATTRIBUTES else key: value for key, value in each.items()}
        yield Message(EXCHANGE, each["type"], data, each["id"], headers, content_type, each["subject"])
