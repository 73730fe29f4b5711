"""Where the time of day comes from, so that tests can hold it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Tells the time."""

    def now(self) -> datetime:
        """Return the time, aware, in UTC."""


class SystemClock:
    """Satisfies `Clock` by the machine's clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)
