"""Values as contracts carry them."""

from __future__ import annotations

from datetime import datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def timestamp(time: datetime | None) -> Timestamp | None:
    """Return an aware time for a field; None leaves the field unset."""
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time)
    return message


def duration(value: timedelta) -> Duration:
    """Return a duration for a field."""
    message = Duration()
    message.FromTimedelta(value)
    return message
