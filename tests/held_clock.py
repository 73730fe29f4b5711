"""A clock that a test holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime


@dataclass
class HeldClock:
    """Satisfies `mesh.clock.Clock`. It begins now, because tokens are checked by the real time of day."""

    time: datetime = field(default_factory=lambda: datetime.now(UTC))

    def now(self) -> datetime:
        return self.time
