"""What can go wrong for a caller of Atelier.

    AtelierError
    ├── NotSignedIn             no session, or one that has ended
    ├── Unreachable             no answer came
    ├── CredentialsUnreadable   the file of sessions is damaged or another's
    ├── TaskNotDone             the task failed or was cancelled; `.task` is it
    ├── TasksNotDone            some of several tasks did
    └── Refused                 the server said no; one class per gRPC code:
        ├── InvalidArgument  NotFound  AlreadyExists  PermissionDenied  Unauthenticated  FailedPrecondition  Aborted
        └── OutOfRange  ResourceExhausted  Cancelled  DeadlineExceeded  Unimplemented  Unavailable  Internal

The server's refusals arrive as google.rpc.Status: in gRPC's trailing metadata, or as JSON in HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import grpc
from atelier.task.v1.task_pb2 import Task
from google.protobuf import json_format
from google.rpc import code_pb2, error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"  # gRPC's richer error model


class AtelierError(Exception):
    """A failure, with what programs need to tell it apart.

    Args:
        message: one sentence for people.
        reason: one word for programs, e.g. QUOTA_EXCEEDED.
        metadata: the values that the message mentions, by name.
        retry_after_seconds: when trying again may help; None when nothing was said of it.
        request_id: what the server's logs call the request; empty when no answer came.
    """

    code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after_seconds: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.code
        self.metadata = dict(metadata or {})
        self.retry_after_seconds = retry_after_seconds
        self.request_id = request_id

    def to_json(self) -> dict[str, Any]:
        """Return the shape that the server gives its refusals."""
        info = {
            "@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "reason": self.reason,
            "domain": "atelier",
            "metadata": self.metadata,
        }
        return {"code": code_pb2.Code.Value(self.code), "message": self.message, "details": [info]}


class NotSignedIn(AtelierError):
    code = "UNAUTHENTICATED"

    def __init__(self, message: str, *, reason: str = "NOT_SIGNED_IN", request_id: str = "") -> None:
        super().__init__(message, reason=reason, request_id=request_id)


class Unreachable(AtelierError):
    code = "UNAVAILABLE"

    def __init__(self, server: str, why: str) -> None:
        metadata = {"server": server, "why": why}
        super().__init__(f"{server} does not answer: {why}.", reason="SERVER_UNREACHABLE", metadata=metadata)


class CredentialsUnreadable(AtelierError):
    code = "FAILED_PRECONDITION"

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message, reason="CREDENTIALS_UNREADABLE", metadata={"path": path})


class TaskNotDone(AtelierError):
    code = "ABORTED"

    def __init__(self, task: Task) -> None:
        cancelled = task.state == Task.STATE_CANCELLED
        super().__init__(
            "The task was cancelled." if cancelled else task.error.message or "The task failed.",
            reason="TASK_CANCELLED" if cancelled else task.error.reason or "TASK_FAILED",
            metadata={"taskId": task.task_id},
        )
        self.task = task


class TasksNotDone(AtelierError):
    code = "ABORTED"

    def __init__(self, failed: int, count: int) -> None:
        metadata = {"failed": str(failed), "count": str(count)}
        super().__init__(f"{failed} of {count} tasks were not done.", reason="TASKS_NOT_DONE", metadata=metadata)


class Refused(AtelierError):
    pass


class Cancelled(Refused):
    code = "CANCELLED"


class InvalidArgument(Refused):
    code = "INVALID_ARGUMENT"


class DeadlineExceeded(Refused):
    code = "DEADLINE_EXCEEDED"


class NotFound(Refused):
    code = "NOT_FOUND"


class AlreadyExists(Refused):
    code = "ALREADY_EXISTS"


class PermissionDenied(Refused):
    code = "PERMISSION_DENIED"


class ResourceExhausted(Refused):
    code = "RESOURCE_EXHAUSTED"


class FailedPrecondition(Refused):
    code = "FAILED_PRECONDITION"


class Aborted(Refused):
    code = "ABORTED"


class OutOfRange(Refused):
    code = "OUT_OF_RANGE"


class Unimplemented(Refused):
    code = "UNIMPLEMENTED"


class Internal(Refused):
    code = "INTERNAL"


class Unavailable(Refused):
    code = "UNAVAILABLE"


class Unauthenticated(Refused):
    code = "UNAUTHENTICATED"


_BY_CODE: Mapping[str, type[Refused]] = {kind.code: kind for kind in Refused.__subclasses__()}

# What a proxy between us and the server may answer without the server's JSON (RFC 9110).
_BY_HTTP_STATUS: Mapping[int, type[Refused]] = {
    400: InvalidArgument, 401: Unauthenticated, 403: PermissionDenied, 404: NotFound, 408: DeadlineExceeded,
    409: AlreadyExists, 413: InvalidArgument, 416: OutOfRange, 429: ResourceExhausted, 499: Cancelled,
    501: Unimplemented, 502: Unavailable, 503: Unavailable, 504: DeadlineExceeded,
}  # fmt: skip


def from_call(failure: grpc.aio.AioRpcError, server: str) -> AtelierError:
    """Return what a failed call of gRPC means."""
    headers: dict[str, Any] = {}
    for part in (failure.initial_metadata(), failure.trailing_metadata()):
        headers.update(part or {})
    if details := headers.get(_DETAILS_KEY):
        return _from_status(status_pb2.Status.FromString(details), headers)
    code = failure.code()
    if not headers and code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        # gRPC made the status up: a server's answer has headers. The cause stands last in its text.
        return Unreachable(server, (failure.details() or code.value[1]).rpartition(": ")[2].rstrip("."))
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        # Ours come with details: this is what gRPC makes of a stream that the edge resets when its service dies.
        return Unavailable("The connection broke off before the answer was complete.", **_from_headers(headers))
    kind = _BY_CODE.get(code.name, Internal)
    return kind(failure.details() or code.value[1], **_from_headers(headers))


def from_response(status: int, headers: Mapping[str, str], body: bytes) -> AtelierError:
    """Return what a response of HTTP with `status` >= 400 and `headers` in lower case means."""
    try:
        refusal = json_format.Parse(body, status_pb2.Status(), ignore_unknown_fields=True)
    except (json_format.ParseError, UnicodeDecodeError):
        kind = _BY_HTTP_STATUS.get(status, Internal)
        return kind(f"The server answered HTTP status {status}.", **_from_headers(headers))
    return _from_status(refusal, headers)


def _from_status(status: status_pb2.Status, headers: Mapping[str, str]) -> AtelierError:
    known = _from_headers(headers)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            known |= {"reason": info.reason, "metadata": dict(info.metadata)}
        elif detail.Unpack(retry):
            known["retry_after_seconds"] = retry.retry_delay.ToTimedelta().total_seconds()
    name = code_pb2.Code.Name(status.code) if status.code in code_pb2.Code.values() else "INTERNAL"
    return _BY_CODE.get(name, Internal)(status.message, **known)


def _from_headers(headers: Mapping[str, str]) -> dict[str, Any]:
    known: dict[str, Any] = {"request_id": headers.get("x-request-id", "")}
    if (retry := headers.get("retry-after", "")).isdecimal():
        known["retry_after_seconds"] = float(retry)
    return known
