"""The one table of refusals, and how they cross the wire."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import json_format
from google.rpc import status_pb2

from mesh import errors, status
from mesh.errors import MeshError

TABLE = [
    (errors.Cancelled, grpc.StatusCode.CANCELLED, 499, "CANCELLED"),
    (errors.InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT, 400, "INVALID_ARGUMENT"),
    (errors.PayloadTooLarge, grpc.StatusCode.INVALID_ARGUMENT, 413, "BODY_TOO_LARGE"),
    (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION, 400, "FAILED_PRECONDITION"),
    (errors.OutOfRange, grpc.StatusCode.OUT_OF_RANGE, 400, "OUT_OF_RANGE"),
    (errors.RangeNotSatisfiable, grpc.StatusCode.OUT_OF_RANGE, 416, "RANGE_NOT_SATISFIABLE"),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED, 401, "UNAUTHENTICATED"),
    (errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED, 403, "PERMISSION_DENIED"),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND, 404, "NOT_FOUND"),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS, 409, "ALREADY_EXISTS"),
    (errors.Aborted, grpc.StatusCode.ABORTED, 409, "ABORTED"),
    (errors.ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "RESOURCE_EXHAUSTED"),
    (errors.Internal, grpc.StatusCode.INTERNAL, 500, "INTERNAL"),
    (errors.Unimplemented, grpc.StatusCode.UNIMPLEMENTED, 501, "UNIMPLEMENTED"),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE, 503, "UNAVAILABLE"),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED, 504, "DEADLINE_EXCEEDED"),
]
CODES = [row for row in TABLE if row[0] in errors.BY_CODE_NUMBER.values()]


class TaskNotFound(errors.NotFound):
    reason = "TASK_NOT_FOUND"


def carried(error: MeshError) -> MeshError:
    """Return what the far side of a call makes of `error`."""
    return status.from_call(status.GRPC_CODES[error.code_number], error.message, status.to_trailers(error))


@pytest.mark.parametrize(("kind", "code", "http_status", "reason"), TABLE)
def test_class_code_http_status_and_reason_are_one_table(kind, code, http_status, reason) -> None:
    assert (kind.code, kind.code_number, kind.http_status, kind.reason) == (
        code.name, code.value[0], http_status, reason,
    )  # fmt: skip
    assert status.GRPC_CODES[kind.code_number] is code


def test_the_table_has_every_class_and_every_code_that_means_something() -> None:
    kinds = {row[0] for row in TABLE}
    unused = {grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}

    assert kinds == {
        each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, MeshError)
    } - {MeshError}  # fmt: skip
    assert {row[1] for row in CODES} == set(grpc.StatusCode) - unused


@pytest.mark.parametrize(("kind", "code", "http_status", "reason"), CODES)
def test_a_class_and_its_reason_cross_the_wire(kind, code, http_status, reason) -> None:
    error = carried(kind("No."))

    assert (type(error), error.reason, error.message) == (kind, reason, "No.")


def test_a_services_own_reason_crosses_the_wire_in_the_class_of_its_code() -> None:
    error = carried(TaskNotFound("There is no task tsk_1.", metadata={"task_id": "tsk_1"}))

    assert (type(error), error.reason, error.metadata) == (errors.NotFound, "TASK_NOT_FOUND", {"task_id": "tsk_1"})


def test_violations_cross_the_wire() -> None:
    error = carried(errors.InvalidArgument("Two fields.", violations={"a.b[0].c": "too long", "d": "required"}))

    assert error.violations == {"a.b[0].c": "too long", "d": "required"}


def test_the_time_to_retry_crosses_the_wire_with_its_milliseconds() -> None:
    error = carried(errors.Unavailable("Later.", retry_after_seconds=1.25))

    assert error.retry_after_seconds == 1.25


def test_an_error_without_a_time_to_retry_stays_without() -> None:
    assert carried(errors.Unavailable("Later.")).retry_after_seconds is None


@pytest.mark.parametrize(("seconds", "header"), [(0.05, "1"), (1.0, "1"), (1.25, "2"), (60.0, "60")])
def test_retry_after_is_whole_seconds_rounded_up(seconds, header) -> None:
    assert dict(status.to_trailers(errors.Unavailable("Later.", retry_after_seconds=seconds)))["retry-after"] == header


def test_an_unauthenticated_caller_is_told_how_to_authenticate() -> None:
    assert dict(status.to_trailers(errors.Unauthenticated("Who?")))["www-authenticate"] == "Bearer"
    assert "www-authenticate" not in dict(status.to_trailers(errors.PermissionDenied("No.")))


def test_text_of_any_language_crosses_the_wire() -> None:
    error = carried(errors.NotFound("没有 “größe” 🙂.", metadata={"name": "größe 🙂"}))

    assert (error.message, error.metadata) == ("没有 “größe” 🙂.", {"name": "größe 🙂"})


def test_the_json_of_a_refusal_has_the_documented_shape() -> None:
    error = errors.InvalidArgument(
        "width is 0.", metadata={"field": "width"}, retry_after_seconds=2, violations={"width": "too small"}
    )
    error.reason = "FIELD_OUT_OF_RANGE"

    assert status.to_json(error) == {
        "code": 3,
        "message": "width is 0.",
        "details": [
            {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": "FIELD_OUT_OF_RANGE",
                "domain": "atelier",
                "metadata": {"field": "width"},
            },
            {
                "@type": "type.googleapis.com/google.rpc.BadRequest",
                "fieldViolations": [{"field": "width", "description": "too small"}],
            },
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "2s"},
        ],
    }


def test_the_json_and_the_trailers_of_a_refusal_say_the_same() -> None:
    error = TaskNotFound("There is none.", metadata={"task_id": "tsk_1"}, retry_after_seconds=1)
    packed = dict(status.to_trailers(error))[status.DETAILS_KEY]

    assert json_format.MessageToDict(status_pb2.Status.FromString(packed)) == status.to_json(error)


@pytest.mark.parametrize(("kind", "code", "http_status", "reason"), CODES)
def test_a_failure_without_details_is_the_class_of_its_code(kind, code, http_status, reason) -> None:
    error = status.from_call(code, "said by grpc itself", ())

    assert (type(error), error.reason, error.message) == (kind, reason, "said by grpc itself")


@pytest.mark.parametrize("code", [grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS])
def test_a_code_that_we_never_send_is_internal(code) -> None:
    assert type(status.from_call(code, None, ())) is errors.Internal


def test_details_of_kinds_that_we_do_not_know_are_passed_over() -> None:
    told = status_pb2.Status(code=5, message="gone")
    told.details.add(type_url="type.googleapis.com/someone.Else", value=b"\xff")

    assert type(status.from_status(told)) is errors.NotFound
