"""What storage asks of the user and the task service, over the mesh."""

from __future__ import annotations

from atelier.task.v1 import task_pb2, task_pb2_grpc
from atelier.user.v1 import user_pb2, user_pb2_grpc

from mesh.errors import FailedPrecondition, NotFound
from services.storage.domain import Standing, undone

_ENDED = {task_pb2.Task.STATE_SUCCEEDED, task_pb2.Task.STATE_FAILED, task_pb2.Task.STATE_CANCELLED}


class MeshQuota:
    """Satisfies `domain.Quota`."""

    def __init__(self, users: user_pb2_grpc.UserServiceAsyncStub) -> None:
        self._users = users

    async def charge(self, file_id: str, user_id: str, size_bytes: int) -> None:
        request = user_pb2.ReserveQuotaRequest(
            reservation_id=file_id,
            user_id=user_id,
            kind=user_pb2.ReserveQuotaRequest.KIND_STORAGE_BYTES,
            amount=size_bytes,
            charge=True,
        )
        try:
            charged = await self._users.ReserveQuota(request)
            if charged.state == user_pb2.Reservation.STATE_HELD:  # by a release that does not know of charging at once
                await self._users.SettleQuota(user_pb2.SettleQuotaRequest(reservation_id=file_id))
        except FailedPrecondition as error:
            if error.reason != "RESERVATION_RELEASED":
                raise
            raise undone() from error

    async def release(self, file_id: str, user_id: str | None) -> None:
        await self._users.ReleaseQuota(user_pb2.ReleaseQuotaRequest(reservation_id=file_id, user_id=user_id or ""))


class MeshTasks:
    """Satisfies `domain.Tasks`."""

    def __init__(self, tasks: task_pb2_grpc.TaskServiceAsyncStub) -> None:
        self._tasks = tasks

    async def standing(self, task_id: str) -> Standing | None:
        try:
            task = await self._tasks.LookupTask(task_pb2.LookupTaskRequest(task_id=task_id))
        except NotFound:
            return None
        return Standing(
            ended=task.state in _ENDED, attempt=task.attempt, output_file_ids=frozenset(task.output_file_ids)
        )
