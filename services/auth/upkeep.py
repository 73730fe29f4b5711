"""What no request does: drops what has expired, so that the tables do not grow for ever."""

from __future__ import annotations

from mesh.clock import Clock
from mesh.service import Background, every
from services.auth.domain import Sessions

FORGET_SECONDS = 3600.0


class Upkeep:
    """Forgets expired refresh tokens and their sessions while its `work` runs."""

    def __init__(self, sessions: Sessions, clock: Clock) -> None:
        self._sessions = sessions
        self._clock = clock

    def work(self) -> list[Background]:
        """Return what must run for ever."""
        return [every(FORGET_SECONDS, self.forget)]

    async def forget(self) -> None:
        """Forget once."""
        await self._sessions.forget(self._clock.now())
