"""The errors that cross the mesh: one class per gRPC code, and nothing else.

    MeshError
    ├── InvalidArgument      INVALID_ARGUMENT     400
    │   └── PayloadTooLarge  INVALID_ARGUMENT     413, at HTTP listeners
    ├── FailedPrecondition   FAILED_PRECONDITION  400
    ├── OutOfRange           OUT_OF_RANGE         400
    │   └── RangeNotSatisfiable                   416, at HTTP listeners
    ├── Unauthenticated      UNAUTHENTICATED      401
    ├── PermissionDenied     PERMISSION_DENIED    403
    ├── NotFound             NOT_FOUND            404
    ├── AlreadyExists        ALREADY_EXISTS       409
    ├── Aborted              ABORTED              409
    ├── ResourceExhausted    RESOURCE_EXHAUSTED   429
    ├── Cancelled            CANCELLED            499
    ├── Internal             INTERNAL             500
    ├── Unimplemented        UNIMPLEMENTED        501
    ├── Unavailable          UNAVAILABLE          503
    └── DeadlineExceeded     DEADLINE_EXCEEDED    504

A service subclasses only a failure that somebody must tell apart, and gives it a `reason`.
How they travel is in `mesh.status`. The statuses are those of google/rpc/code.proto.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class MeshError(Exception):
    """A failure that its caller is told about.

    Args:
        message: one sentence for people: what was wrong and what would be right.
        metadata: every value that the message mentions, by name.
        retry_after_seconds: when trying again may help, > 0.
        violations: field path to what is wrong with it, for bad requests.
    """

    code: ClassVar[str]
    code_number: ClassVar[int]
    http_status: ClassVar[int]
    reason: str

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after_seconds: float | None = None,
        violations: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after_seconds = retry_after_seconds
        self.violations = dict(violations or {})


class Cancelled(MeshError):
    code, code_number, http_status, reason = "CANCELLED", 1, 499, "CANCELLED"


class InvalidArgument(MeshError):
    code, code_number, http_status, reason = "INVALID_ARGUMENT", 3, 400, "INVALID_ARGUMENT"


class PayloadTooLarge(InvalidArgument):
    http_status, reason = 413, "BODY_TOO_LARGE"


class DeadlineExceeded(MeshError):
    code, code_number, http_status, reason = "DEADLINE_EXCEEDED", 4, 504, "DEADLINE_EXCEEDED"


class NotFound(MeshError):
    code, code_number, http_status, reason = "NOT_FOUND", 5, 404, "NOT_FOUND"


class AlreadyExists(MeshError):
    code, code_number, http_status, reason = "ALREADY_EXISTS", 6, 409, "ALREADY_EXISTS"


class PermissionDenied(MeshError):
    code, code_number, http_status, reason = "PERMISSION_DENIED", 7, 403, "PERMISSION_DENIED"


class ResourceExhausted(MeshError):
    code, code_number, http_status, reason = "RESOURCE_EXHAUSTED", 8, 429, "RESOURCE_EXHAUSTED"


class FailedPrecondition(MeshError):
    code, code_number, http_status, reason = "FAILED_PRECONDITION", 9, 400, "FAILED_PRECONDITION"


class Aborted(MeshError):
    code, code_number, http_status, reason = "ABORTED", 10, 409, "ABORTED"


class OutOfRange(MeshError):
    code, code_number, http_status, reason = "OUT_OF_RANGE", 11, 400, "OUT_OF_RANGE"


class RangeNotSatisfiable(OutOfRange):
    http_status, reason = 416, "RANGE_NOT_SATISFIABLE"


class Unimplemented(MeshError):
    code, code_number, http_status, reason = "UNIMPLEMENTED", 12, 501, "UNIMPLEMENTED"


class Internal(MeshError):
    code, code_number, http_status, reason = "INTERNAL", 13, 500, "INTERNAL"


class Unavailable(MeshError):
    code, code_number, http_status, reason = "UNAVAILABLE", 14, 503, "UNAVAILABLE"


class Unauthenticated(MeshError):
    code, code_number, http_status, reason = "UNAUTHENTICATED", 16, 401, "UNAUTHENTICATED"


BY_CODE_NUMBER: Mapping[int, type[MeshError]] = {
    error.code_number: error
    for error in (
        Cancelled, InvalidArgument, DeadlineExceeded, NotFound, AlreadyExists, PermissionDenied, ResourceExhausted,
        FailedPrecondition, Aborted, OutOfRange, Unimplemented, Internal, Unavailable, Unauthenticated,
    )
}  # fmt: skip
