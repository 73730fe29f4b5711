"""Events on the broker, as CloudEvents 1.0 in binary mode with a protobuf payload.

Source: CloudEvents AMQP protocol binding 1.0.2, section 3.1; the trace context is W3C's for AMQP.
"""

from __future__ import annotations

from datetime import datetime

from google.protobuf.message import Message as Payload
from opentelemetry import propagate

from mesh import context
from mesh.outbox import Message

EXCHANGE = "atelier.events"


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
