"""From a permit to a finished task: claim, keep the lease, work, finish. One task's fate touches no other's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from atelier.storage.v1 import storage_pb2, storage_pb2_grpc
from atelier.task.v1 import task_pb2, task_pb2_grpc

from mesh import bounds, crash, status
from mesh.broker import Broker, Delivery
from mesh.errors import DeadlineExceeded, Internal, MeshError, Unavailable
from mesh.together import Together
from services.media.convert import operation_from
from services.media.domain import Model, Work, canonical, full_disks_told, resources_used, result_name
from services.media.peers import Storage
from services.media.processes import ENCODER, Slot
from services.media.worker.capacity import CPU, GPU
from services.media.worker.results import Results, work_json

QUEUES = {CPU: "media.cpu", GPU: "media.gpu"}
LEASE_SHARE = 0.8  # of the lease; what is left is for clocks that run apart and calls under way
RENEW_SECONDS = 1.0  # also how soon a cancelled task is noticed
RENEW_AT_MOST_EVERY_SECONDS = 0.5
RETRY_SECONDS = 0.3
COMPLETED_TOGETHER = 100
# Shares of the bar: most of a task's time is the operation itself.
DOWNLOADED, PROCESSED = 0.1, 0.9

log = logging.getLogger(__name__)


class Draining(Unavailable):
    reason = "DRAINING"


class Lease:
    """The right to work on a task, by this process's own clock."""

    def __init__(self, assignment: task_pb2.ClaimTaskResponse.Assignment, sent_at: float) -> None:
        self.task_id = assignment.task.task_id
        self.attempt = assignment.task.attempt
        self.capability = assignment.capability
        self.lost = False
        self.prolong(assignment.lease_duration.ToTimedelta().total_seconds(), sent_at)

    def prolong(self, seconds: float, sent_at: float) -> None:
        """Take a lease of `seconds` that was asked for at `sent_at` of the monotonic clock."""
        self._until = sent_at + LEASE_SHARE * seconds

    def left_seconds(self) -> float:
        return self._until - time.monotonic()


@dataclass(slots=True)
class Progress:
    """How far one task is; `news` is set when that changed."""

    news: asyncio.Event
    fraction: float = 0.0
    stage: str = "download"

    def at(self, stage: str, fraction: float) -> None:
        self.stage, self.fraction = stage, fraction
        self.news.set()


class Worker:
    """Does as many tasks at a time as it has slots."""

    def __init__(
        self,
        tasks: task_pb2_grpc.TaskServiceAsyncStub,
        results: storage_pb2_grpc.StorageServiceAsyncStub,
        storage: Storage,
        slots: Sequence[Slot],
        *,
        pools: Sequence[str],
        models: Sequence[Model] = (),
        face_detector: str,
        fonts: str,
        worker_id: str,
        drain_seconds: float,
    ) -> None:
        self._tasks = tasks
        self._results = results
        self._made = Results(results)
        self._storage = storage
        self._pools = pools
        self._models = models
        self._face_detector = face_detector
        self._fonts = fonts
        self._worker_id = worker_id
        self._drain_seconds = drain_seconds
        self._draining = False
        self._working: set[asyncio.Task[None]] = set()
        self._permits = 0  # in hand, waiting for a slot
        self._promising: set[str] = set()  # pools that had more when they were last asked
        self._completed = Together(partial(completed, tasks), at_most=COMPLETED_TOGETHER)
        self._free: asyncio.Queue[Slot | None] = asyncio.Queue()  # None wakes who waits for a slot when draining
        for slot in slots:
            self._free.put_nowait(slot)

    async def run(self, broker: Broker) -> None:
        """Take permits for ever; when cancelled, finish what can be finished and give back the rest."""
        # One permit at a time, of each pool: a permit waits here only for a slot, and those that follow stay with the
        # broker, for workers that have one.
        consuming = [
            asyncio.create_task(broker.consume(QUEUES[pool], partial(self.take, pool), prefetch=1))
            for pool in self._pools
        ]
        try:
            await asyncio.wait(consuming, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._draining = True
            for each in consuming:
                self._free.put_nowait(None)
                each.cancel()
            await asyncio.wait(consuming)
            await self._drain()
            raise
        for each in consuming:  # one met a bug
            each.cancel()
        await asyncio.wait(consuming)
        await asyncio.gather(*consuming)

    async def take(self, pool: str, _permit: Delivery) -> None:
        """Claim a task and begin it: then the permit has done its duty.

        Raises:
            Unavailable: not now: the permit is kept, and nothing else is taken until it could be used.
        """
        self._permits += 1
        try:
            slot = await self._free.get()
        finally:
            self._permits -= 1
        if slot is None or self._draining:
            raise Draining("This worker is stopping.")
        await self._fill(slot, [pool])

    async def _fill(self, slot: Slot, pools: Sequence[str]) -> None:
        """Begin the next task of the first pool that has one in a free slot.

        Raises:
            Unavailable: not now.
        """
        begun = False
        try:
            if not self._storage.present():
                # Claimed now, every waiting task would use up its attempts on an outage that says nothing about it.
                raise Unavailable("Storage is away.")
            for pool in pools:
                sent_at = time.monotonic()
                claim = await self._tasks.ClaimTask(task_pb2.ClaimTaskRequest(pool=pool, worker_id=self._worker_id))
                self._promising.discard(pool)
                if claim.more:
                    self._promising.add(pool)
                if claim.HasField("assignment"):
                    crash.point("worker: claimed")
                    lease = Lease(claim.assignment, sent_at)
                    working = asyncio.create_task(self._occupy(slot, pool, claim.assignment, lease))
                    begun = True
                    self._working.add(working)
                    working.add_done_callback(self._working.discard)
                    return
        except MeshError as failure:
            raise Unavailable(f"No task could be claimed: {failure.message}") from failure
        finally:
            if not begun:
                self._free.put_nowait(slot)

    async def _occupy(
        self, slot: Slot, pool: str, assignment: task_pb2.ClaimTaskResponse.Assignment, lease: Lease
    ) -> None:
        try:
            await self._carry_out(assignment, lease, slot)
        except Exception:  # or the slot would be lost, and a worker without slots looks healthy
            log.exception("the end of a task met a bug", extra={"task_id": lease.task_id})
        await self._free_again(slot, pool)

    async def _free_again(self, slot: Slot, pool: str) -> None:
        """Give a slot to whoever has a permit in hand; else claim without: a batch has fewer permits than tasks.

        The pool whose task has just ended is asked first: it is likelier to have another.
        """
        pools = sorted(self._promising, key=lambda each: each != pool)
        if self._permits or self._draining or not pools:
            self._free.put_nowait(slot)
            return
        with contextlib.suppress(Unavailable):  # the next permit tries again
            await self._fill(slot, pools)

    async def _drain(self) -> None:
        if self._working:
            await asyncio.wait(self._working, timeout=self._drain_seconds)
        for working in self._working:
            working.cancel()
        if self._working:
            await asyncio.wait(self._working)

    async def _carry_out(self, assignment: task_pb2.ClaimTaskResponse.Assignment, lease: Lease, slot: Slot) -> None:
        progress = Progress(asyncio.Event())
        work = asyncio.create_task(self._outputs(assignment, slot, progress))
        keeping = asyncio.create_task(self._keep(lease, progress, work))
        began = time.monotonic()
        try:
            file_ids = await work
        except asyncio.CancelledError:
            outcome = "lease lost" if lease.lost else "returned"
            await self._discard(lease)
            if not lease.lost:
                await self._fail(lease, Draining("The worker stops."), returned=True)
        except MeshError as failure:
            outcome = failure.reason
            keeping.cancel()
            await self._fail(lease, failure)
            await self._discard(lease)  # also lets those go on who wait for the same results
        except Exception:
            log.exception("a task met a bug", extra={"task_id": lease.task_id})
            outcome = "bug"
            keeping.cancel()
            await self._fail(lease, Internal("The worker failed."))
            await self._discard(lease)
        else:
            keeping.cancel()
            crash.point("worker: result stored")
            outcome = await self._complete(lease, file_ids)
            crash.point("worker: completed")
        finally:
            keeping.cancel()
            await slot.clear()
        log.info(
            "task %s",
            outcome,
            extra={
                "task_id": lease.task_id,
                "attempt": lease.attempt,
                "kind": assignment.task.operation.WhichOneof("kind"),
                "seconds": round(time.monotonic() - began, 3),
            },
        )

    async def _outputs(
        self, assignment: task_pb2.ClaimTaskResponse.Assignment, slot: Slot, progress: Progress
    ) -> list[str]:
        """Do the work and return the ids of what it made."""
        task, capability = assignment.task, assignment.capability
        operation = operation_from(task.operation)
        others = list(dict.fromkeys(bounds.file_references(task.operation)))
        said = canonical(operation, {file_id: f"file {n}" for n, file_id in enumerate(others, 1)})
        work = storage_pb2.Work(
            input_file_ids=[task.input_file_id, *others],
            operation=said,
            encoder=ENCODER,
            model=resources_used(said, self._models, self._face_detector, self._fonts),
        )
        async with self._made.taken(work, capability) as file_ids:
            if file_ids:
                log.info("made before", extra={"task_id": task.task_id, "attempt": task.attempt})
                return file_ids
            with full_disks_told():
                return await self._make(assignment, operation, work, slot, progress)

    async def _make(
        self,
        assignment: task_pb2.ClaimTaskResponse.Assignment,
        operation: Work,
        work: storage_pb2.Work,
        slot: Slot,
        progress: Progress,
    ) -> list[str]:
        task, capability = assignment.task, assignment.capability
        slot.make_folder()
        source = slot.folder / "input"
        name = await self._storage.read_input(task.input_file_id, capability, source)
        files = {file_id: slot.folder / f"file-{n}" for n, file_id in enumerate(work.input_file_ids[1:])}
        for file_id, path in files.items():
            await self._storage.read_input(file_id, capability, path)
        progress.at("decode", DOWNLOADED)
        results = await slot.run(
            operation,
            source,
            files,
            slot.folder,
            lambda share: progress.at("process", DOWNLOADED + (PROCESSED - DOWNLOADED) * share),
        )
        progress.at("upload", PROCESSED)
        made_of = {"work": work_json(work), "count": str(len(results))}
        return [
            await self._storage.write_result(
                index, result_name(name or task.task_id, written), written, capability, made_of
            )
            for index, written in enumerate(results)
        ]

    async def _keep(self, lease: Lease, progress: Progress, work: asyncio.Task[list[str]]) -> None:
        """Renew the lease until this is cancelled; when it is lost, stop the work."""
        while True:
            await asyncio.sleep(RENEW_AT_MOST_EVERY_SECONDS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_SECONDS - RENEW_AT_MOST_EVERY_SECONDS):
                    await progress.news.wait()
            progress.news.clear()
            request = task_pb2.RenewLeaseRequest(
                task_id=lease.task_id,
                attempt=lease.attempt,
                progress=task_pb2.Task.Progress(fraction=progress.fraction, stage=progress.stage),
            )
            sent_at = time.monotonic()
            try:
                if lease.left_seconds() <= 0:
                    raise DeadlineExceeded("The lease could not be renewed in time.")
                renewed = await self._tasks.RenewLease(request, timeout=lease.left_seconds())
                lease.prolong(renewed.lease_duration.ToTimedelta().total_seconds(), sent_at)
            except MeshError as failure:
                if failure.reason == "LEASE_LOST" or lease.left_seconds() <= 0:
                    lease.lost = True
                    work.cancel()
                    return

    async def _complete(self, lease: Lease, file_ids: Sequence[str]) -> str:
        request = task_pb2.CompleteTaskRequest(task_id=lease.task_id, attempt=lease.attempt, output_file_ids=file_ids)
        reason = await self._told(lease, self._completed, request)
        if reason == "LEASE_LOST":
            await self._discard(lease)
        return reason or "succeeded"

    async def _fail(self, lease: Lease, failure: MeshError, *, returned: bool = False) -> None:
        request = task_pb2.FailTaskRequest(
            task_id=lease.task_id,
            attempt=lease.attempt,
            error=task_pb2.Task.Error(code=failure.code_number, message=failure.message, reason=failure.reason),
            transient=isinstance(failure, Unavailable | Internal),
            returned=returned,
        )
        await self._told(lease, self._tasks.FailTask, request)

    async def _told(self, lease: Lease, call: Callable[[Any], Awaitable[Any]], request: Any) -> str:
        """Tell the task service how an attempt ended; return why it does not know, empty when it does."""
        while True:
            try:
                await call(request)
            except MeshError as failure:
                if failure.reason == "LEASE_LOST" or lease.left_seconds() <= 0:
                    return failure.reason
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return ""

    async def _discard(self, lease: Lease) -> None:
        """Delete what the attempt may have stored; storage's own reconciler does it where this fails."""
        with contextlib.suppress(MeshError):
            await self._results.DiscardResult(storage_pb2.DiscardResultRequest(capability=lease.capability))


async def completed(
    tasks: task_pb2_grpc.TaskServiceAsyncStub, requests: Sequence[task_pb2.CompleteTaskRequest]
) -> list[Exception | None]:
    """Tell the task service of tasks that ended well at the same time; return what it refuses."""
    answer = await tasks.CompleteTasks(task_pb2.CompleteTasksRequest(tasks=requests))
    return [status.from_status(each) if each.code else None for each in answer.outcomes]
