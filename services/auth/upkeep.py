"""What no request does: drops what has expired, so that the tables do not grow for ever."""

from __future__ import annotations

from mesh.clock import Clock
from mesh.lock import Locks
from mesh.service import Background
from services.auth.domain import FORGET, Sessions

FORGET_SECONDS = 3600.0


class Upkeep:
    """Forgets expired refresh tokens and their sessions while its `work` runs."""

    def __init__(self, sessions: Sessions, clock: Clock) -> None:
        self._sessions = sessions
        self._clock = clock

    def work(self, locks: Locks) -> list[Background]:
        """Return what must run for ever, on one replica."""
        return [locks.alone(FORGET, FORGET_SECONDS, self.forget)]

    async def forget(self, fence: int) -> None:
        """Forget once."""
        await self._sessions.forget(self._clock.now(), fence)
