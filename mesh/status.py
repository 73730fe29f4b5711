"""How `mesh.errors` travel: as google.rpc.Status in gRPC trailers, and as its JSON in HTTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import any_pb2, json_format
from google.rpc import error_details_pb2, status_pb2

from mesh.errors import BY_CODE_NUMBER, Internal, MeshError

DOMAIN = "atelier"  # google.rpc.ErrorInfo.domain of every error of ours
DETAILS_KEY = "grpc-status-details-bin"  # gRPC's richer error model
RETRY_AFTER_KEY = "retry-after"

LONGEST_TEXT = 400  # characters; three texts, worst encoded, must fit in the 8 KiB that gRPC takes as trailers

GRPC_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def clipped(text: str) -> str:
    """Return `text`, of which no more is told than fits: it may quote what a caller sent."""
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"


def to_status(error: MeshError) -> status_pb2.Status:
    """Return the wire form of `error`, with ErrorInfo, and BadRequest and RetryInfo where they apply."""
    metadata = {key: clipped(value) for key, value in error.metadata.items()}
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)]
    if error.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
                    for field, text in error.violations.items()
                ]
            )
        )
    if error.retry_after_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(error.retry_after_seconds * 1000))
        details.append(retry)
    status = status_pb2.Status(code=error.code_number, message=clipped(error.message))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def retry_after_header(error: MeshError) -> str | None:
    """Return whole seconds for `Retry-After` (RFC 9110), rounded up; None when there is nothing to say."""
    return None if error.retry_after_seconds is None else str(max(1, math.ceil(error.retry_after_seconds)))


def to_trailers(error: MeshError) -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailing metadata that carries `error`."""
    trailers: list[tuple[str, str | bytes]] = [(DETAILS_KEY, to_status(error).SerializeToString())]
    if retry_after := retry_after_header(error):
        trailers.append((RETRY_AFTER_KEY, retry_after))
    if error.code == "UNAUTHENTICATED":
        trailers.append(("www-authenticate", "Bearer"))
    return tuple(trailers)


def to_json(error: MeshError) -> dict[str, Any]:
    """Return `error` as JSON: exactly what the edge's transcoder makes of `to_trailers`."""
    return json_format.MessageToDict(to_status(error))


def from_status(status: status_pb2.Status) -> MeshError:
    """Return the error that `to_status` was given; an unknown reason becomes the class of its code."""
    error = BY_CODE_NUMBER.get(status.code, Internal)(status.message)
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    bad_request = error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Unpack(info):
            error.reason = info.reason
            error.metadata = dict(info.metadata)
        elif detail.Unpack(retry):
            error.retry_after_seconds = retry.retry_delay.ToTimedelta().total_seconds()
        elif detail.Unpack(bad_request):
            error.violations = {each.field: each.description for each in bad_request.field_violations}
    return error


def from_call(code: grpc.StatusCode, message: str | None, trailers: Sequence[tuple[str, str | bytes]]) -> MeshError:
    """Return the error of a failed call; one without details becomes the class of its code."""
    for key, value in trailers:
        if key == DETAILS_KEY and isinstance(value, bytes):
            return from_status(status_pb2.Status.FromString(value))
    return BY_CODE_NUMBER.get(code.value[0], Internal)(message or code.value[1])
