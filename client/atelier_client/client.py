"""Atelier for Python programs: what `atelier_client` shows, on the generated stubs."""

from __future__ import annotations

import asyncio
import io
import mimetypes
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, urlencode

import grpc
from atelier.auth.v1 import auth_pb2
from atelier.auth.v1.auth_pb2_grpc import AuthServiceStub
from atelier.media.v1.media_pb2 import Operation
from atelier.mesh.v1 import topology_pb2
from atelier.mesh.v1.topology_pb2_grpc import TopologyServiceStub
from atelier.storage.v1 import storage_pb2
from atelier.storage.v1.storage_pb2 import File
from atelier.storage.v1.storage_pb2_grpc import StorageServiceStub
from atelier.task.v1 import task_pb2, webhook_pb2
from atelier.task.v1.task_pb2 import Task, TaskBatch
from atelier.task.v1.task_pb2_grpc import TaskServiceStub
from atelier.task.v1.webhook_pb2 import Webhook, WebhookDelivery
from atelier.task.v1.webhook_pb2_grpc import WebhookServiceStub
from atelier.user.v1 import user_pb2
from atelier.user.v1.user_pb2 import Quota, User
from atelier.user.v1.user_pb2_grpc import UserServiceStub
from google.protobuf import json_format
from google.protobuf.message import Message

from atelier_client.credentials import Credentials, MemoryCredentials, Session
from atelier_client.errors import (
    Aborted,
    AtelierError,
    DeadlineExceeded,
    NotSignedIn,
    ResourceExhausted,
    TaskNotDone,
    Unauthenticated,
    Unavailable,
    Unreachable,
    from_call,
)
from atelier_client.files import written
from atelier_client.server import Server
from atelier_client.transfer import OnBytes, downloaded, uploaded

CALL_SECONDS = 65.0  # of one call; the server's own deadlines, in the contract, are shorter
REFRESH_SECONDS = 15.0  # of the call that refreshes a session, while other commands wait for it (LOCK_SECONDS)
WATCH_SECONDS = 3600.0  # the contract's longest watch; then it is resumed
REFRESH_EARLY = timedelta(seconds=70)  # a token must outlive the call that it is sent with
CANCEL_SECONDS = 10.0  # how long someone who gives up waits for the server to hear of it
EVENTS_AT_ONCE = 200  # the contract's most: all are wanted
BATCH_SECONDS = 1.0  # between two looks at a batch
WATCH_PATIENCE_SECONDS = 60.0  # how long a watch bears a server that is away
QUOTA_PATIENCE_SECONDS = 2.0  # how long it asks again for what may be given back at any moment
RUN_PATIENCE_SECONDS = 30.0  # how long each other step of a run does; a killed service is back in a few
ENDED = frozenset({Task.STATE_SUCCEEDED, Task.STATE_FAILED, Task.STATE_CANCELLED})

_SERVICES = [
    module.DESCRIPTOR.services_by_name[name]
    for module, name in (
        (auth_pb2, "AuthService"),
        (topology_pb2, "TopologyService"),
        (storage_pb2, "StorageService"),
        (task_pb2, "TaskService"),
        (user_pb2, "UserService"),
        (webhook_pb2, "WebhookService"),
    )
]
# Later Pythons than 3.11 know these; a name that is not known is sent as octets, which the server looks into.
_MORE_TYPES = {".webp": "image/webp", ".avif": "image/avif"}

T = TypeVar("T")
Answer = TypeVar("Answer", bound=Message)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far `Atelier.run` is."""

    stage: str
    """`sending`, a stage of the task (`Task.Progress.stage`), or `cancelled`."""
    fraction: float
    """Of the stage while sending, of the task after; 0..1."""
    task: Task | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What `Atelier.run` made: most operations one file, some several, in order."""

    task: Task
    files: Sequence[File]

    @property
    def file(self) -> File:
        return self.files[0]


class Atelier:
    """One person's connection to one server. Make it with `connect`.

    Every method raises `AtelierError`. The session is refreshed unseen, and shared with whoever uses
    the same credentials.
    """

    def __init__(self, server: Server, channel: grpc.aio.Channel, credentials: Credentials) -> None:
        self.server = server
        self._credentials = credentials
        self._auth = AuthServiceStub(channel)
        self._storage = StorageServiceStub(channel)
        self._tasks = TaskServiceStub(channel)
        self._webhooks = WebhookServiceStub(channel)
        self._topology = TopologyServiceStub(channel)
        self._users = UserServiceStub(channel)

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str, *, credentials: Credentials | None = None) -> AsyncIterator[Atelier]:
        """Open a connection; the first call finds out whether the server is there.

        Args:
            url: `http://host[:port]`, or `https://…` for TLS with the machine's authorities.
            credentials: where the session is kept; None means in memory.

        Raises:
            ValueError: `url` is something else.
        """
        server = Server.parse(url)
        async with server.channel(_SERVICES) as channel:
            yield cls(server, channel, credentials or MemoryCredentials())

    async def ping(self) -> None:
        """Find out whether calls get through; needs no session."""
        with suppress(Unauthenticated):  # what a server says that is there
            await self._call(self._users.GetUser, user_pb2.GetUserRequest(user_id="me"), token="")

    # Accounts

    async def register(self, username: str, email: str, password: str) -> User:
        """Make an account. Does not sign in."""
        request = user_pb2.RegisterUserRequest(
            username=username, email=email, password=password, request_id=secrets.token_hex(16)
        )
        return await self._call(self._users.RegisterUser, request, token="")

    async def login(self, login: str, password: str) -> User:
        """Sign in by username or email; the session goes to the credentials."""
        request = user_pb2.LoginRequest(login=login, password=password)
        answer = await self._call(self._users.Login, request, token="")
        session = Session(
            user_id=answer.user.user_id,
            username=answer.user.username,
            access_token=answer.access_token,
            refresh_token=answer.refresh_token,
            expire_time=answer.expire_time.ToDatetime(tzinfo=UTC),
        )
        async with self._credentials.locked():
            self._credentials.write(session)
        return answer.user

    async def logout(self, *, all_sessions: bool = False) -> None:
        """End the session, or all of the user's. Here it ends even when the server cannot be told."""
        async with self._credentials.locked():
            session = self._credentials.read()
            self._credentials.write(None)
        if session is not None:
            request = auth_pb2.RevokeSessionRequest(refresh_token=session.refresh_token, all_sessions=all_sessions)
            await self._call(self._auth.RevokeSession, request, token="")

    async def refresh(self) -> None:
        """Get new tokens now, e.g. because one's role has changed."""
        session = self._credentials.read()
        await self._token(refused=session.access_token if session else "")

    def session(self) -> Session | None:
        """Return who is signed in, without asking the server."""
        return self._credentials.read()

    async def me(self) -> User:
        return await self._signed_in(self._users.GetUser, user_pb2.GetUserRequest(user_id="me"))

    async def quota(self, user_id: str = "me") -> Quota:
        return await self._signed_in(self._users.GetQuota, user_pb2.GetQuotaRequest(user_id=user_id))

    # Files

    async def upload(
        self,
        source: Path | str | bytes,
        *,
        name: str | None = None,
        content_type: str | None = None,
        request_id: str | None = None,
        on_bytes: OnBytes = lambda _done, _size: None,
    ) -> File:
        """Store a file.

        Args:
            source: a path, or the bytes themselves; those need a `name`.
            name: None means the path's last part.
            content_type: None means what the name's extension says; the server compares it with the bytes.
            request_id: repeated with the same one, the call answers the first one's file.
            on_bytes: called with bytes sent and bytes in all.

        Raises:
            AtelierError: also when the source is a pipe, or its name not in UTF-8.
        """
        if isinstance(source, bytes) and name is None:
            raise ValueError("bytes need a name")
        name = name or Path(str(source)).name
        _require_utf8(name)
        guessed = _MORE_TYPES.get(Path(name).suffix.lower()) or mimetypes.guess_type(name)[0]
        headers = {
            "content-type": content_type or guessed or "application/octet-stream",
            # A refreshed token means a second attempt, which must not make a second file.
            "idempotency-key": request_id or secrets.token_hex(16),
        }
        target = f"/api/v1/files?{urlencode({'name': name}, quote_via=quote)}"
        with _opened(source) as file:

            async def attempt(token: str) -> bytes:
                authorized = {**headers, "authorization": f"Bearer {token}"}
                return await uploaded(self.server, target, authorized, file, on_bytes)

            return json_format.Parse(await self._with_token(attempt), File(), ignore_unknown_fields=True)

    async def download(
        self, file_id: str, to: Path | str | BinaryIO, *, on_bytes: OnBytes = lambda _done, _size: None
    ) -> int:
        """Write a file's bytes to `to`, and return how many; a path's file is whole or not there."""
        return await self._fetched(f"/api/v1/files/{quote(file_id, safe='')}/content", to, on_bytes)

    async def render(
        self,
        file_id: str,
        to: Path | str | BinaryIO,
        *,
        width: int | None = None,
        height: int | None = None,
        fit: str | None = None,
        format: str | None = None,  # noqa: A002 - the contract's name
        quality: int | None = None,
        on_bytes: OnBytes = lambda _done, _size: None,
    ) -> int:
        """Write an image at another size to `to`, as `download` does; no task, and nothing is stored.

        What is wanted is as RenderFileRequest says; `fit` and `format` are e.g. `fill` and `webp`.
        """
        wanted = {"width": width, "height": height, "fit": fit, "format": format, "quality": quality}
        query = urlencode({name: value for name, value in wanted.items() if value is not None})
        return await self._fetched(f"/api/v1/files/{quote(file_id, safe='')}/render?{query}", to, on_bytes)

    async def sign_url(self, file_id: str, *, render: str | None = None, lifetime: timedelta | None = None) -> str:
        """Return a URL of a file's content that needs no token; of a render when its query is given: `width=320`."""
        request = storage_pb2.SignFileUrlRequest(file_id=file_id, render=render)
        if lifetime is not None:
            request.lifetime_duration.FromTimedelta(lifetime)
        signed = await self._signed_in(self._storage.SignFileUrl, request)
        return f"{self.server.url}{signed.url}"

    async def _fetched(self, target: str, to: Path | str | BinaryIO, on_bytes: OnBytes) -> int:
        with _sink(to) as sink:

            async def attempt(token: str) -> int:
                return await downloaded(self.server, target, {"authorization": f"Bearer {token}"}, sink, on_bytes)

            return await self._with_token(attempt)

    async def file(self, file_id: str) -> File:
        return await self._signed_in(self._storage.GetFile, storage_pb2.GetFileRequest(file_id=file_id))

    async def files(self) -> AsyncIterator[File]:
        """Yield one's files, newest first."""
        request = storage_pb2.ListFilesRequest()
        while True:
            page = await self._signed_in(self._storage.ListFiles, request)
            for file in page.files:
                yield file
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def delete_file(self, file_id: str) -> None:
        await self._signed_in(self._storage.DeleteFile, storage_pb2.DeleteFileRequest(file_id=file_id))

    # Tasks

    async def create_task(
        self,
        input_file_id: str,
        operation: Operation,
        *,
        request_id: str | None = None,
        deadline: timedelta | None = None,
        webhook_url: str = "",
    ) -> Task:
        """Queue an operation; with the same `request_id` again, the same task is answered.

        With a deadline, it fails unless it has ended so long after its creation. With a `webhook_url`, that hears of
        its end in place of the account's webhook.
        """
        request = task_pb2.CreateTaskRequest(
            input_file_id=input_file_id,
            operation=operation,
            request_id=request_id or secrets.token_hex(16),
            webhook_url=webhook_url,
        )
        if deadline is not None:
            request.deadline_duration.FromTimedelta(deadline)
        return await self._admitted(self._tasks.CreateTask, request)

    async def task(self, task_id: str) -> Task:
        return await self._signed_in(self._tasks.GetTask, task_pb2.GetTaskRequest(task_id=task_id))

    async def tasks(
        self, state: Task.State.ValueType = Task.STATE_UNSPECIFIED, *, batch_id: str = ""
    ) -> AsyncIterator[Task]:
        """Yield one's tasks, newest first; unspecified means in any state, no batch means of any."""
        request = task_pb2.ListTasksRequest(state=state, batch_id=batch_id)
        while True:
            page = await self._signed_in(self._tasks.ListTasks, request)
            for task in page.tasks:
                yield task
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def cancel_task(self, task_id: str) -> Task:
        return await self._signed_in(self._tasks.CancelTask, task_pb2.CancelTaskRequest(task_id=task_id))

    async def retry_task(self, task_id: str) -> Task:
        return await self._admitted(self._tasks.RetryTask, task_pb2.RetryTaskRequest(task_id=task_id))

    async def create_task_batch(
        self,
        items: Iterable[tuple[str, Operation]],
        *,
        request_id: str | None = None,
        deadline: timedelta | None = None,
        webhook_url: str = "",
    ) -> TaskBatch:
        """Queue up to 1,000 operations, each on a file by its id, all or none; else as `create_task`."""
        request = task_pb2.CreateTaskBatchRequest(
            request_id=request_id or secrets.token_hex(16), webhook_url=webhook_url
        )
        for input_file_id, operation in items:
            request.items.add(input_file_id=input_file_id, operation=operation)
        if deadline is not None:
            request.deadline_duration.FromTimedelta(deadline)
        return await self._admitted(self._tasks.CreateTaskBatch, request)

    async def task_batch(self, batch_id: str) -> TaskBatch:
        return await self._signed_in(self._tasks.GetTaskBatch, task_pb2.GetTaskBatchRequest(batch_id=batch_id))

    async def cancel_task_batch(self, batch_id: str) -> TaskBatch:
        return await self._signed_in(self._tasks.CancelTaskBatch, task_pb2.CancelTaskBatchRequest(batch_id=batch_id))

    async def watch_batch(self, batch_id: str) -> AsyncIterator[TaskBatch]:
        """Yield the batch now and whenever it has changed, until all its tasks have ended. Asks once a second."""
        seen = None
        while True:
            batch = await patiently(lambda: self.task_batch(batch_id))
            if batch != seen:
                yield batch
                seen = batch
            if not batch.state_counts.queued and not batch.state_counts.running:
                return
            await asyncio.sleep(BATCH_SECONDS)

    async def task_events(self, task_id: str) -> list[task_pb2.TaskEvent]:
        """Return what happened to a task, oldest first."""
        request = task_pb2.ListTaskEventsRequest(task_id=task_id, page_size=EVENTS_AT_ONCE)
        events = list[task_pb2.TaskEvent]()
        while True:
            page = await self._signed_in(self._tasks.ListTaskEvents, request)
            events += page.events
            if not page.next_page_token:
                return events
            request.page_token = page.next_page_token

    async def watch(self, task_id: str) -> AsyncIterator[Task]:
        """Yield the task now and after every change, until it has ended.

        A stream that breaks is resumed where it was, an expired token refreshed.
        """
        request = task_pb2.WatchTaskRequest(task_id=task_id)
        patience = _Patience(WATCH_PATIENCE_SECONDS)
        refused = ""
        while True:
            token = await self._token(refused=refused)
            stream = self._tasks.WatchTask(request, metadata=_bearer(token), timeout=WATCH_SECONDS)
            try:
                async for answer in stream:
                    patience.restored()
                    refused = ""
                    request.cursor = answer.cursor
                    yield answer.task
                    if answer.task.state in ENDED:
                        return
                await patience.tried(Unavailable("The server ended the watch before the task."))
            except grpc.aio.AioRpcError as failure:
                error = from_call(failure, self.server.url)
                if isinstance(error, Unauthenticated) and not refused:
                    refused = token
                elif isinstance(error, Unavailable | Unreachable | DeadlineExceeded | Aborted):
                    await patience.tried(error)
                else:
                    raise error from failure
            finally:
                stream.cancel()  # leaving the loop does not

    async def run(
        self,
        source: Path | str | bytes | File,
        operation: Operation,
        *,
        name: str | None = None,
        deadline: timedelta | None = None,
        on_progress: Callable[[Progress], None] = lambda _progress: None,
    ) -> Result:
        """Send a file, run an operation on it, and wait for its end. Cancelled, it cancels the task.

        Args:
            source: a path, bytes (with their `name`), or a file that the server has.
            operation: what to do.
            name: see `upload`.
            deadline: see `create_task`.
            on_progress: called at every step.

        Raises:
            TaskNotDone: the task failed, or someone else cancelled it.
        """
        file = source if isinstance(source, File) else await self._sent(source, name, on_progress)
        request_id = secrets.token_hex(16)
        creating = asyncio.ensure_future(
            patiently(lambda: self.create_task(file.file_id, operation, request_id=request_id, deadline=deadline))
        )
        try:
            # Shielded: a task whose creation is broken off here may still be created there.
            task_id = (await asyncio.shield(creating)).task_id
            async for task in self.watch(task_id):
                on_progress(Progress(task.progress.stage, task.progress.fraction, task))
        except asyncio.CancelledError:
            with suppress(AtelierError, TimeoutError):
                async with asyncio.timeout(CANCEL_SECONDS):
                    task = await self.cancel_task((await creating).task_id)
                    on_progress(Progress("cancelled", task.progress.fraction, task))
            raise
        if task.state != Task.STATE_SUCCEEDED:
            raise TaskNotDone(task)
        return Result(task, [await patiently(partial(self.file, file_id)) for file_id in task.output_file_ids])

    async def run_batch(
        self,
        items: Sequence[tuple[File, Operation]],
        *,
        deadline: timedelta | None = None,
        on_progress: Callable[[TaskBatch], None] = lambda _batch: None,
    ) -> list[Task]:
        """Run operations on files that the server has, and wait until all have ended. Cancelled, it cancels them.

        Args:
            items: each file with what to do; up to 1,000.
            deadline: of each; see `create_task`.
            on_progress: called whenever they are further.

        Returns:
            The tasks, in the order of `items`, however each ended.
        """
        asked, request_id = [(file.file_id, operation) for file, operation in items], secrets.token_hex(16)
        creating = asyncio.ensure_future(
            patiently(lambda: self.create_task_batch(asked, request_id=request_id, deadline=deadline))
        )
        try:
            batch_id = (await asyncio.shield(creating)).batch_id  # see `run`
            async for batch in self.watch_batch(batch_id):
                on_progress(batch)
        except asyncio.CancelledError:
            with suppress(AtelierError, TimeoutError):
                async with asyncio.timeout(CANCEL_SECONDS):
                    on_progress(await self.cancel_task_batch((await creating).batch_id))
            raise
        newest_first = [task async for task in self.tasks(batch_id=batch_id)]
        return newest_first[::-1]

    async def _sent(
        self, source: Path | str | bytes, name: str | None, on_progress: Callable[[Progress], None]
    ) -> File:
        def on_bytes(done: int, size: int) -> None:
            on_progress(Progress("sending", done / size if size else 1.0))

        on_progress(Progress("sending", 0.0))
        request_id = secrets.token_hex(16)
        return await patiently(lambda: self.upload(source, name=name, request_id=request_id, on_bytes=on_bytes))

    # Webhooks

    async def webhook(self) -> Webhook:
        """Return one's webhook, with the secret that signs."""
        return await self._signed_in(self._webhooks.GetWebhook, webhook_pb2.GetWebhookRequest())

    async def set_webhook(self, url: str) -> Webhook:
        """Name the URL that hears of the end of all one's tasks."""
        return await self._signed_in(self._webhooks.SetWebhook, webhook_pb2.SetWebhookRequest(url=url))

    async def delete_webhook(self) -> None:
        await self._signed_in(self._webhooks.DeleteWebhook, webhook_pb2.DeleteWebhookRequest())

    async def rotate_webhook_secret(self) -> Webhook:
        """Make a new secret; the one before signs as well for a day."""
        return await self._signed_in(self._webhooks.RotateWebhookSecret, webhook_pb2.RotateWebhookSecretRequest())

    async def webhook_deliveries(self, *, task_id: str = "") -> AsyncIterator[WebhookDelivery]:
        """Yield what was, is or will be sent to one's webhooks, newest first; no task means of any."""
        request = webhook_pb2.ListWebhookDeliveriesRequest(task_id=task_id)
        while True:
            page = await self._signed_in(self._webhooks.ListWebhookDeliveries, request)
            for delivery in page.deliveries:
                yield delivery
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def resend_webhook_delivery(self, delivery_id: str) -> WebhookDelivery:
        request = webhook_pb2.ResendWebhookDeliveryRequest(delivery_id=delivery_id)
        return await self._signed_in(self._webhooks.ResendWebhookDelivery, request)

    # Administration

    async def grant_admin(self, login: str, secret: str) -> User:
        """Make an account an administrator by the installation's own secret; needs no session."""
        request = user_pb2.GrantAdminRequest(login=login, secret=secret)
        return await self._call(self._users.GrantAdmin, request, token="")

    async def audit_quotas(self) -> AsyncIterator[user_pb2.AuditQuotasResponse]:
        """Yield page by page what of everybody's quotas does not agree, looked at twice where it does not."""
        request = user_pb2.AuditQuotasRequest()
        while True:
            answer = await self._signed_in(self._users.AuditQuotas, request)
            yield answer
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token

    async def set_limits(self, user_id: str, *, tasks: int | None = None, storage_bytes: int | None = None) -> Quota:
        """Set an account's own limits; None goes back to what its role has."""
        request = user_pb2.SetLimitsRequest(user_id=user_id, tasks=tasks, storage_bytes=storage_bytes)
        return await self._signed_in(self._users.SetLimits, request)

    async def set_role(
        self,
        user_id: str,
        *,
        role: User.Role.ValueType = User.ROLE_UNSPECIFIED,
        status: User.Status.ValueType = User.STATUS_UNSPECIFIED,
    ) -> User:
        """Set an account's role or status; what is unspecified stays."""
        request = user_pb2.SetRoleRequest(user_id=user_id, role=role, status=status)
        return await self._signed_in(self._users.SetRole, request)

    async def rotate_keys(self) -> auth_pb2.RotateKeysResponse:
        """Make a new key for signing tokens."""
        return await self._signed_in(self._auth.RotateKeys, auth_pb2.RotateKeysRequest())

    async def dead_letters(self, *, reason: str = "") -> AsyncIterator[task_pb2.DeadLetter]:
        """Yield tasks that used up their attempts, oldest first; no reason means with any."""
        request = task_pb2.ListDeadLettersRequest(reason=reason)
        while True:
            page = await self._signed_in(self._tasks.ListDeadLetters, request)
            for letter in page.dead_letters:
                yield letter
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def redrive_tasks(
        self, task_ids: Iterable[str] = (), *, reason: str = ""
    ) -> AsyncIterator[task_pb2.RedriveTasksResponse]:
        """Queue dead letters again, up to a hundred by their ids or all with a reason; yield what became of them."""
        request = task_pb2.RedriveTasksRequest(task_ids=task_ids, reason=reason)
        while True:
            answer = await self._signed_in(self._tasks.RedriveTasks, request)
            yield answer
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token

    async def replay_tasks(self, *, rebuild: bool) -> AsyncIterator[task_pb2.ReplayTasksResponse]:
        """Compare everybody's tasks with their events, and mend those that differ if asked to; yield page by page."""
        request = task_pb2.ReplayTasksRequest(rebuild=rebuild)
        while True:
            answer = await self._signed_in(self._tasks.ReplayTasks, request)
            yield answer
            if not answer.next_page_token:
                return
            request.page_token = answer.next_page_token

    async def topology(self, service: str = "") -> topology_pb2.GetTopologyResponse:
        """Return what the mesh looks like now; of one service, in more detail."""
        request = topology_pb2.GetTopologyRequest(service=service)
        return await self._signed_in(self._topology.GetTopology, request)

    # How calls are made

    async def _call(
        self,
        rpc: grpc.aio.UnaryUnaryMultiCallable[Any, Answer],
        request: Message,
        *,
        token: str,
        seconds: float = CALL_SECONDS,
    ) -> Answer:
        try:
            return await rpc(request, timeout=seconds, metadata=_bearer(token) if token else None)
        except grpc.aio.AioRpcError as failure:
            raise from_call(failure, self.server.url) from failure

    async def _signed_in(self, rpc: grpc.aio.UnaryUnaryMultiCallable[Any, Answer], request: Message) -> Answer:
        return await self._with_token(lambda token: self._call(rpc, request, token=token))

    async def _admitted(self, rpc: grpc.aio.UnaryUnaryMultiCallable[Any, Answer], request: Message) -> Answer:
        """As `_signed_in`, and again where the refusal names a moment: a task just cancelled is still reserved for."""
        patience = _Patience(QUOTA_PATIENCE_SECONDS)
        while True:
            try:
                return await self._signed_in(rpc, request)
            except ResourceExhausted as error:
                if (error.retry_after_seconds or QUOTA_PATIENCE_SECONDS) >= QUOTA_PATIENCE_SECONDS:
                    raise
                await patience.tried(error)

    async def _with_token(self, attempt: Callable[[str], Awaitable[T]]) -> T:
        """Run `attempt`, once more with a new token when the first is refused (a clock may be wrong)."""
        token = await self._token()
        try:
            return await attempt(token)
        except Unauthenticated:
            return await attempt(await self._token(refused=token))

    async def _token(self, *, refused: str = "") -> str:
        """Return an access token that still lives and is not `refused`."""
        session = self._credentials.read()
        if session is not None and _usable(session, refused):
            return session.access_token
        async with self._credentials.locked():
            session = self._credentials.read()  # another may have refreshed it while we waited
            if session is None:
                raise NotSignedIn(f"You are not signed in at {self.server.url}.")
            if not _usable(session, refused):
                session = await self._refreshed(session)
                self._credentials.write(session)
            return session.access_token

    async def _refreshed(self, session: Session) -> Session:
        request = auth_pb2.RefreshTokensRequest(refresh_token=session.refresh_token)
        try:
            tokens = await self._call(self._auth.RefreshTokens, request, token="", seconds=REFRESH_SECONDS)
        except Unauthenticated as error:
            self._credentials.write(None)
            text = f"Your session at {self.server.url} has ended."
            raise NotSignedIn(text, reason=error.reason, request_id=error.request_id) from error
        return Session(
            user_id=session.user_id,
            username=session.username,
            access_token=tokens.access_token,
            refresh_token=tokens.refresh_token,
            expire_time=tokens.expire_time.ToDatetime(tzinfo=UTC),
        )


class _Patience:
    """Waits longer after every failure, and gives up when a time has passed without success."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.restored()

    def restored(self) -> None:
        self._since: float | None = None
        self._pause_seconds = 0.1

    async def tried(self, error: AtelierError) -> None:
        now = asyncio.get_running_loop().time()
        self._since = self._since or now
        if now - self._since > self._seconds:
            raise error
        await asyncio.sleep(error.retry_after_seconds or self._pause_seconds)
        self._pause_seconds = min(2.0, 2 * self._pause_seconds)


async def patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try again while a service behind the edge is away, or undoes what it began; no server at all is told at once."""
    patience = _Patience(RUN_PATIENCE_SECONDS)
    while True:
        try:
            return await attempt()
        except Unreachable:
            raise
        except (Unavailable, Aborted) as error:
            await patience.tried(error)


def _usable(session: Session, refused: str) -> bool:
    return session.access_token != refused and session.expire_time - REFRESH_EARLY > datetime.now(UTC)


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@contextmanager
def _opened(source: Path | str | bytes) -> Iterator[BinaryIO]:
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        if not file.seekable():  # its length is told before it, and it may be sent twice
            text = f"{source!s} is no regular file; keep what it gives in one first."
            raise AtelierError(text, reason="FILE_UNUSABLE")
        yield file


def _require_utf8(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        text = f"The name {name!r} is not in UTF-8; give the file another one."
        raise AtelierError(text, reason="FILE_NAME_INVALID") from error


def _sink(to: Path | str | BinaryIO) -> AbstractContextManager[BinaryIO]:
    return written(Path(to)) if isinstance(to, Path | str) else nullcontext(to)
