"""What no request does: asks what became of reservations, has outdated tokens revoked, drops what has expired."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence

from atelier.auth.v1 import auth_pb2, auth_pb2_grpc
from atelier.task.v1 import task_pb2_grpc

from mesh.clock import Clock
from mesh.errors import MeshError, NotFound
from mesh.lock import Locks
from mesh.service import Background, every
from services.user import convert
from services.user.domain import FORGET, Accounts, Quotas, State

ASK_SECONDS = 30.0
REVOKE_SECONDS = 0.25  # a change by any replica has a second to take effect
FORGET_SECONDS = 3600.0

log = logging.getLogger(__name__)


class Upkeep:
    """Asks the task service about reservations that have waited too long for an event: time alone releases nothing.

    Tells the auth service of each generation of an account that has ended, until it is heard.
    """

    def __init__(
        self,
        accounts: Accounts,
        quotas: Quotas,
        tasks: task_pb2_grpc.TaskServiceAsyncStub,
        auth: auth_pb2_grpc.AuthServiceAsyncStub,
        clock: Clock,
    ) -> None:
        self._accounts = accounts
        self._quotas = quotas
        self._tasks = tasks
        self._auth = auth
        self._clock = clock

    def work(self, locks: Locks) -> list[Background]:
        """Return what must run for ever: on every replica what people wait for, on one what nobody misses for a day."""
        return [
            every(ASK_SECONDS, self.ask),
            every(REVOKE_SECONDS, self.revoke),
            locks.alone(FORGET, FORGET_SECONDS, self._accounts.forget),
        ]

    async def ask(self) -> None:
        """Ask once about each reservation that is due."""
        for reservation_id in _shuffled(await self._quotas.overdue(self._clock.now())):
            try:
                state = await self._fate(reservation_id)
            except MeshError as error:
                # The task service is away or unwell: the next round asks again.
                log.warning("cannot ask about a reservation", extra={"reason": error.reason})
                return
            await self._quotas.resolve(reservation_id, state, self._clock.now())

    async def revoke(self) -> None:
        """Tell once of each generation that has ended."""
        for generation_id in _shuffled(await self._accounts.ended_generations()):
            try:
                await self._auth.RevokeGeneration(auth_pb2.RevokeGenerationRequest(generation=generation_id))
            except MeshError as error:
                # The auth service is away or unwell: the next round tells again.
                log.warning("cannot revoke a generation of tokens", extra={"reason": error.reason})
                return
            await self._accounts.note_revoked(generation_id)

    async def _fate(self, reservation_id: str) -> State:
        """Return what becomes of a reservation, `<task id>/<round>`."""
        try:
            task = await self._tasks.LookupTask(convert.lookup_of(reservation_id))
        except NotFound:
            return State.RELEASED
        return convert.fate_from(reservation_id, task)


def _shuffled(ids: Sequence[str]) -> list[str]:
    """Return ids in an order of chance: a round ends with what fails, and one that always does holds up no other."""
    return random.sample(ids, len(ids))
