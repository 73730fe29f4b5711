"""atelier.task.v1.TaskService and WebhookService: read the request, call the domain, write the answer."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from functools import partial

from atelier.storage.v1 import storage_pb2, storage_pb2_grpc
from atelier.task.v1 import task_pb2 as pb
from atelier.task.v1 import task_pb2_grpc, webhook_pb2, webhook_pb2_grpc
from atelier.user.v1 import user_pb2, user_pb2_grpc
from google.api.httpbody_pb2 import HttpBody

from mesh import bounds, capability, context, crash, ids, status, telemetry, wire
from mesh.clock import Clock
from mesh.errors import InvalidArgument, MeshError, NotFound, Unimplemented
from services.task import convert, domain, sse, webhooks
from services.task.domain import UNSERVED, WAITING, Change, State, Step, Task, Tasks, Terms
from services.task.watch import Watches
from services.task.webhooks import PATIENCE, Network, Webhooks

REDRIVEN_AT_ONCE = 100  # of a reason, in one call
REPLAYED_AT_ONCE = 200  # in one transaction, which others wait for
ASKED_AT_ONCE = 50  # files of a batch: enough to hide the way to storage, not enough to fill its doorway
ASKED_TOGETHER = 1000  # files in one call, as the contract says
CLAIMS_WAIT_SECONDS = 0.03  # at most, for creates

log = logging.getLogger(__name__)


class TaskService(task_pb2_grpc.TaskServiceServicer):
    """Raises MeshError only; the mesh turns it into a status.

    Args:
        tasks: where tasks are kept.
        watches: follows them.
        storage: knows what files are.
        users: knows what their owners may use.
        hooks: takes the URLs that tasks name.
        capability_key: signs what a worker may read and write.
        terms: returns what a worker is promised now.
        is_unserved: tells whether a pool lacks workers.
        clock: the time of day.
        claims_wait_seconds: how long a claim may wait for creates.
    """

    def __init__(
        self,
        tasks: Tasks,
        watches: Watches,
        storage: storage_pb2_grpc.StorageServiceAsyncStub,
        users: user_pb2_grpc.UserServiceAsyncStub,
        hooks: WebhookService,
        *,
        capability_key: str,
        terms: Callable[[], Terms],
        is_unserved: Callable[[str], bool],
        clock: Clock,
        claims_wait_seconds: float = CLAIMS_WAIT_SECONDS,
    ) -> None:
        self._tasks = tasks
        self._watches = watches
        self._storage = storage
        self._users = users
        self._hooks = hooks
        self._capability_key = capability_key
        self._terms = terms
        self._is_unserved = is_unserved
        self._clock = clock
        self._creates = _Creates(claims_wait_seconds)

    async def CreateTask(self, request: pb.CreateTaskRequest, _: object) -> pb.Task:
        with self._creates.one():
            return convert.task_to_proto(await self._created(request))

    async def _created(self, request: pb.CreateTaskRequest) -> Task:
        user = context.user()
        webhook_url = await self._hooks.taken(request.webhook_url, user.user_id)
        task_id = ids.new("tsk")
        file_ids = tuple(dict.fromkeys(bounds.file_references(request)))
        # Storage is asked while the key is decided; what it says counts only afterwards.
        refusals = asyncio.gather(
            *(self._require_supported(file_id, user.user_id) for file_id in file_ids), return_exceptions=True
        )
        try:
            if request.request_id:
                # From here on every call with this key works on one task: the first to come through makes it, and what
                # a crash left half done the next one finishes.
                fingerprint = convert.fingerprint(request)
                key = request.request_id
                task_id, first = await self._tasks.adopt(user.user_id, "CreateTask", key, fingerprint, task_id)
                crash.point("create: key kept")
                present = None if first else await self._tasks.find(task_id)
                if present is not None:
                    return present
            for refusal in filter(None, await refusals):
                raise refusal
        finally:
            refusals.cancel()
        crash.point("create: file known")

        step = partial(
            domain.created,
            task_id=task_id,
            user_id=user.user_id,
            role=user.role,
            input_file_id=request.input_file_id,
            file_ids=file_ids,
            operation=request.operation.SerializeToString(deterministic=True),
            pool=convert.pool_of(request.operation),
            deadline=convert.deadline_from(request),
            request_id=context.request_id(),
            trace_id=telemetry.trace_id(),
            webhook_url=webhook_url,
        )
        reserved_time = await self._reserve(user.user_id, [task_id], round_=1)
        crash.point("create: quota reserved")

        def create(now: datetime) -> Change:
            domain.require_fresh(reserved_time, self._clock.now())
            return step(now)

        return await self._tasks.add(task_id, create)

    async def CreateTaskBatch(self, request: pb.CreateTaskBatchRequest, _: object) -> pb.TaskBatch:
        user = context.user()
        webhook_url = await self._hooks.taken(request.webhook_url, user.user_id)
        batch_id = ids.new("bat")
        if request.request_id:  # as in CreateTask
            key, fingerprint = request.request_id, convert.fingerprint(request)
            batch_id, first = await self._tasks.adopt(user.user_id, "CreateTaskBatch", key, fingerprint, batch_id)
            crash.point("batch: key kept")
            present = None if first else await self._tasks.find_batch(batch_id)
            if present is not None:
                return convert.batch_to_proto(present)

        files = [tuple(dict.fromkeys(bounds.file_references(item))) for item in request.items]
        await self._require_all_supported(files, user.user_id)
        crash.point("batch: files known")

        pools = [convert.pool_of(item.operation) for item in request.items]
        waking = {
            number
            for pool in domain.POOLS
            for number in [number for number, each in enumerate(pools) if each == pool][: domain.PERMITS]
        }
        # Named by the batch: a repeated call reserves for the same tasks.
        task_ids = [ids.numbered("tsk", batch_id, number) for number in range(len(request.items))]
        steps = [
            partial(
                domain.created,
                task_id=task_id,
                user_id=user.user_id,
                role=user.role,
                input_file_id=item.input_file_id,
                file_ids=file_ids,
                operation=item.operation.SerializeToString(deterministic=True),
                pool=pool,
                deadline=convert.deadline_from(request),
                batch_id=batch_id,
                request_id=context.request_id(),
                trace_id=telemetry.trace_id(),
                webhook_url=webhook_url,
                permitted=number in waking,
            )
            for number, (task_id, item, file_ids, pool) in enumerate(
                zip(task_ids, request.items, files, pools, strict=True)
            )
        ]
        reserved_time = await self._reserve(user.user_id, task_ids, round_=1)
        crash.point("batch: quota reserved")

        def create(now: datetime) -> list[Change]:
            domain.require_fresh(reserved_time, self._clock.now())
            return [step(now) for step in steps]

        return convert.batch_to_proto(await self._tasks.add_batch(batch_id, create))

    async def GetTaskBatch(self, request: pb.GetTaskBatchRequest, _: object) -> pb.TaskBatch:
        batch = await self._tasks.find_batch(request.batch_id)
        return convert.batch_to_proto(domain.require_batch(batch, request.batch_id, context.user().user_id))

    async def CancelTaskBatch(self, request: pb.CancelTaskBatchRequest, _: object) -> pb.TaskBatch:
        owner = context.user().user_id
        return convert.batch_to_proto(await self._tasks.change_batch(request.batch_id, domain.stopped, owner=owner))

    async def GetTask(self, request: pb.GetTaskRequest, _: object) -> pb.Task:
        task = await self._watches.ended(
            request.task_id,
            context.user(),
            within_seconds=request.wait.ToTimedelta().total_seconds(),
            stopping=context.draining(),
        )
        return convert.task_to_proto(self._shown(task))

    async def ListTasks(self, request: pb.ListTasksRequest, _: object) -> pb.ListTasksResponse:
        query = convert.query_from(request, context.user().user_id)
        page = await self._tasks.page(query)
        return pb.ListTasksResponse(
            tasks=[convert.task_to_proto(self._shown(task)) for task in page.tasks],
            next_page_token=convert.page_token(page),
        )

    async def WatchTask(self, request: pb.WatchTaskRequest, _: object) -> AsyncIterator[pb.WatchTaskResponse]:
        after = convert.cursor_from(request.cursor)
        async for task in self._followed(request.task_id, after):
            if task is not None:
                yield pb.WatchTaskResponse(task=convert.task_to_proto(task), cursor=convert.cursor(task))

    async def WatchTaskEvents(self, request: pb.WatchTaskEventsRequest, _: object) -> AsyncIterator[HttpBody]:
        after = convert.cursor_from(context.metadata().get("last-event-id", ""))
        tasks = self._followed(request.task_id, after)
        news = ((convert.cursor(task), convert.task_to_json(task)) if task else None async for task in tasks)
        async for frame in sse.framed(context.until_ended(news), refusal=_refusal):
            yield HttpBody(content_type=sse.CONTENT_TYPE, data=frame)

    async def CancelTask(self, request: pb.CancelTaskRequest, _: object) -> pb.Task:
        task = await self._tasks.change(request.task_id, domain.cancelled, owner=context.user().user_id)
        return convert.task_to_proto(task)

    async def RetryTask(self, request: pb.RetryTaskRequest, _: object) -> pb.Task:
        task = await self._own(request.task_id)
        domain.require_retryable(task)
        domain.require_rounds(task)
        return convert.task_to_proto(await self._queued_again(task, role=context.user().role, reason="RETRIED"))

    async def ListDeadLetters(self, request: pb.ListDeadLettersRequest, _: object) -> pb.ListDeadLettersResponse:
        page = await self._tasks.dead(convert.dead_query_from(request))
        return pb.ListDeadLettersResponse(
            dead_letters=map(convert.dead_letter_to_proto, page.tasks), next_page_token=convert.dead_page_token(page)
        )

    async def RedriveTasks(self, request: pb.RedriveTasksRequest, _: object) -> pb.RedriveTasksResponse:
        domain.require_either(request.task_ids, request.reason)
        task_ids, next_page_token = list(dict.fromkeys(request.task_ids)), ""
        if request.reason:
            page = await self._tasks.dead(convert.redrive_query_from(request, REDRIVEN_AT_ONCE))
            task_ids, next_page_token = [task.task_id for task in page.tasks], convert.dead_page_token(page)
        answer = pb.RedriveTasksResponse(next_page_token=next_page_token)
        # One after the other: they may be one user's, whose turns and quota are given one at a time anyway.
        for task_id in task_ids:
            [outcome] = await asyncio.gather(self._redriven(task_id), return_exceptions=True)
            if isinstance(outcome, MeshError):
                answer.refusals.append(convert.refusal_to_proto(task_id, outcome))
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                answer.task_ids.append(task_id)
        return answer

    async def ReplayTasks(self, request: pb.ReplayTasksRequest, _: object) -> pb.ReplayTasksResponse:
        after = convert.replay_place_from(request.page_token)
        return convert.replay_to_proto(await self._tasks.replay(after, REPLAYED_AT_ONCE, rebuild=request.rebuild))

    async def ListTaskEvents(self, request: pb.ListTaskEventsRequest, _: object) -> pb.ListTaskEventsResponse:
        query = convert.event_query_from(request)
        await self._own(request.task_id)
        page = await self._tasks.events(query)
        return pb.ListTaskEventsResponse(
            events=map(convert.event_to_proto, page.events), next_page_token=convert.event_page_token(page)
        )

    async def ClaimTask(self, request: pb.ClaimTaskRequest, _: object) -> pb.ClaimTaskResponse:
        await self._creates.passed()
        claimed = partial(domain.claimed, terms=self._terms())
        page = await self._tasks.claim(request.pool, request.max_tasks or 1, claimed)
        for task in page.tasks:
            log.info(
                "claimed",
                extra={"task_id": task.task_id, "attempt": task.attempt, "worker_id": request.worker_id},
            )
        assignments = [self._assignment(task) for task in page.tasks]
        first = assignments[0] if assignments else None
        return pb.ClaimTaskResponse(assignment=first, others=assignments[1:], more=page.more)

    async def RenewLease(self, request: pb.RenewLeaseRequest, _: object) -> pb.RenewLeaseResponse:
        progress = convert.progress_from(request)
        step = partial(domain.renewed, attempt=request.attempt, progress=progress, terms=self._terms())
        await self._tasks.change(request.task_id, step)
        return pb.RenewLeaseResponse(lease_duration=wire.duration(self._terms().lease))

    async def CompleteTask(self, request: pb.CompleteTaskRequest, _: object) -> pb.CompleteTaskResponse:
        outputs = tuple(request.output_file_ids)
        await self._tasks.change(
            request.task_id, partial(domain.completed, attempt=request.attempt, output_file_ids=outputs)
        )
        return pb.CompleteTaskResponse()

    async def CompleteTasks(self, request: pb.CompleteTasksRequest, _: object) -> pb.CompleteTasksResponse:
        outcomes = await asyncio.gather(*(self.CompleteTask(each, _) for each in request.tasks), return_exceptions=True)
        return pb.CompleteTasksResponse(outcomes=map(convert.outcome_to_proto, outcomes))

    async def FailTask(self, request: pb.FailTaskRequest, _: object) -> pb.FailTaskResponse:
        task = await self._tasks.change(request.task_id, self._ending(request))
        return pb.FailTaskResponse(state=convert.state_to_proto(task.state))

    async def LookupTask(self, request: pb.LookupTaskRequest, _: object) -> pb.LookupTaskResponse:
        task = domain.require_found(await self._tasks.find(request.task_id), request.task_id)
        return pb.LookupTaskResponse(
            state=convert.state_to_proto(task.state),
            attempt=task.attempt,
            output_file_ids=task.output_file_ids,
            reservation_id=task.reservation_id,
        )

    async def _followed(self, task_id: str, after: int | None) -> AsyncGenerator[Task | None]:
        """Follow a task of the present user; when nothing happens for a while, say it if it lacks a worker."""
        said: Task | None = None
        async with aclosing(self._watches.follow(task_id, context.user(), after=after)) as tasks:
            async for task in tasks:
                present = task or said
                news = None if present is None else self._shown(present)
                yield None if task is None and news == said else news
                said = news

    def _shown(self, task: Task) -> Task:
        """Return a task as people see it: one that waits tells of a pool without workers."""
        if task.state is not State.QUEUED:
            return task
        return replace(task, progress=UNSERVED if self._is_unserved(task.pool) else WAITING)

    async def _own(self, task_id: str) -> Task:
        return domain.require_found(await self._tasks.find(task_id), task_id, context.user().user_id)

    async def _redriven(self, task_id: str) -> Task:
        task = domain.require_found(await self._tasks.find(task_id), task_id)
        domain.require_dead(task)
        return await self._queued_again(task, role=task.role, reason="REDRIVEN")

    async def _queued_again(self, task: Task, *, role: str, reason: str) -> Task:
        round_ = task.round + 1
        reserved_time = await self._reserve(task.user_id, [task.task_id], round_=round_)
        crash.point("retry: quota reserved")

        def retry(task: Task, now: datetime) -> Change:
            domain.require_fresh(reserved_time, self._clock.now())
            return domain.retried(task, now, round_=round_, role=role, reason=reason)

        return await self._tasks.change(task.task_id, retry, owner=task.user_id)

    async def _require_supported(self, file_id: str, user_id: str, content_type: str | None = None) -> None:
        if content_type is None:
            file = await self._storage.StatFile(storage_pb2.StatFileRequest(file_id=file_id, user_id=user_id))
            content_type = file.content_type
        domain.require_supported(file_id, content_type)

    async def _content_types(self, file_ids: Sequence[str], user_id: str) -> dict[str, str]:
        """Return what a user's files are; without those of which storage cannot say it at once."""
        found: dict[str, str] = {}
        for start in range(0, len(file_ids), ASKED_TOGETHER):
            some = file_ids[start : start + ASKED_TOGETHER]
            with suppress(Unimplemented):  # by storage's release of before this call
                answer = await self._storage.StatFiles(storage_pb2.StatFilesRequest(file_ids=some, user_id=user_id))
                found |= {file.file_id: file.content_type for file in answer.files}
        return found

    async def _require_all_supported(self, files: Sequence[Sequence[str]], user_id: str) -> None:
        """Refuse a batch with a file that no worker can read, blaming the first item that has one."""
        first = {file_id: index for index, file_ids in reversed([*enumerate(files)]) for file_id in file_ids}
        asked = sorted(first, key=first.__getitem__)
        known = await self._content_types(asked, user_id)
        for start in range(0, len(asked), ASKED_AT_ONCE):
            some = asked[start : start + ASKED_AT_ONCE]
            answers = await asyncio.gather(
                *(self._require_supported(file_id, user_id, known.get(file_id)) for file_id in some),
                return_exceptions=True,
            )
            for file_id, answer in zip(some, answers, strict=True):
                if isinstance(answer, NotFound | InvalidArgument):
                    raise domain.blamed(answer, first[file_id])
                if answer is not None:
                    raise answer

    async def _reserve(self, user_id: str, task_ids: Sequence[str], *, round_: int) -> datetime:
        """Set a user's quota aside for tasks, all or none; return since when, at the latest, it surely holds.

        Nobody gives it back when a later step fails: another call with the same key may be about to commit on it, and
        whether a commit failed is not always known. The user service asks what became of the task instead.
        """
        before = self._clock.now()
        await self._users.ReserveQuotas(
            user_pb2.ReserveQuotasRequest(
                reservation_ids=[domain.reservation_id(task_id, round_) for task_id in task_ids],
                user_id=user_id,
                kind=user_pb2.ReserveQuotaRequest.KIND_TASKS,
                amount=1,
            )
        )
        return before

    def _assignment(self, task: Task) -> pb.ClaimTaskResponse.Assignment:
        return pb.ClaimTaskResponse.Assignment(
            task=convert.task_to_proto(task),
            lease_duration=wire.duration(self._terms().lease),
            capability=self._capability(task),
        )

    def _capability(self, task: Task) -> str:
        granted = capability.Capability(
            task_id=task.task_id,
            attempt=task.attempt,
            user_id=task.user_id,
            input_file_ids=task.file_ids,
            max_bytes=self._terms().result_max_bytes,
            expire_time=self._clock.now() + self._terms().longest,
        )
        return capability.sign(self._capability_key, granted)

    def _ending(self, request: pb.FailTaskRequest) -> Step:
        failure = convert.failure_from(request.error)
        if request.returned:
            return partial(domain.returned, attempt=request.attempt, failure=failure)
        return partial(
            domain.failed,
            attempt=request.attempt,
            failure=failure,
            transient=request.transient,
            terms=self._terms(),
            jitter=random.random(),  # noqa: S311 - spreads tasks over time, keeps no secret
        )


class _Creates:
    """The creates under way, which claims let go first: somebody waits for a create, nobody for a claim."""

    def __init__(self, patience_seconds: float) -> None:
        self._patience_seconds = patience_seconds
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    @contextmanager
    def one(self) -> Iterator[None]:
        self._count += 1
        self._none.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._none.set()

    async def passed(self) -> None:
        """Wait until none is under way; where there is always one, only for a moment."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience_seconds):
                await self._none.wait()


class WebhookService(webhook_pb2_grpc.WebhookServiceServicer):
    """Raises MeshError only; the mesh turns it into a status.

    Args:
        hooks: where webhooks and deliveries are kept.
        allowed: networks where receivers may be though the world cannot reach them.
    """

    def __init__(self, hooks: Webhooks, allowed: Collection[Network]) -> None:
        self._hooks = hooks
        self._allowed = allowed

    async def taken(self, url: str, user_id: str) -> str | None:
        """Return the URL that a task names, None for none, once its owner has a secret to sign with.

        Raises:
            WebhookUrlRefused: it is no plain address of the web.
        """
        if not url:
            return None
        webhooks.require_url(url, "webhookUrl", self._allowed)
        await self._hooks.ensure(user_id, _new_secret())
        return url

    async def GetWebhook(self, _request: webhook_pb2.GetWebhookRequest, _: object) -> webhook_pb2.Webhook:
        webhook = await self._hooks.find(context.user().user_id)
        return convert.webhook_to_proto(webhooks.require_webhook(webhook))

    async def SetWebhook(self, request: webhook_pb2.SetWebhookRequest, _: object) -> webhook_pb2.Webhook:
        webhooks.require_url(request.url, "url", self._allowed)
        return convert.webhook_to_proto(await self._hooks.put(context.user().user_id, request.url, _new_secret()))

    async def DeleteWebhook(
        self, _request: webhook_pb2.DeleteWebhookRequest, _: object
    ) -> webhook_pb2.DeleteWebhookResponse:
        await self._hooks.clear(context.user().user_id)
        return webhook_pb2.DeleteWebhookResponse()

    async def RotateWebhookSecret(
        self, _request: webhook_pb2.RotateWebhookSecretRequest, _: object
    ) -> webhook_pb2.Webhook:
        return convert.webhook_to_proto(await self._hooks.rotate(context.user().user_id, _new_secret()))

    async def ListWebhookDeliveries(
        self, request: webhook_pb2.ListWebhookDeliveriesRequest, _: object
    ) -> webhook_pb2.ListWebhookDeliveriesResponse:
        page = await self._hooks.page(convert.delivery_query_from(request, context.user().user_id))
        return webhook_pb2.ListWebhookDeliveriesResponse(
            deliveries=[convert.delivery_to_proto(each, page.webhook) for each in page.deliveries],
            next_page_token=convert.delivery_page_token(page),
        )

    async def ResendWebhookDelivery(
        self, request: webhook_pb2.ResendWebhookDeliveryRequest, _: object
    ) -> webhook_pb2.WebhookDelivery:
        owner = context.user().user_id
        return convert.delivery_to_proto(*await self._hooks.resend(request.delivery_id, owner, PATIENCE))


def _new_secret() -> str:
    return webhooks.new_secret(secrets.token_bytes(webhooks.SECRET_BYTES))


def _refusal(error: MeshError) -> str:
    return json.dumps(status.to_json(error), ensure_ascii=False, separators=(",", ":"))
