"""What refusals become at the client; made by the mesh's own translator, so that both sides agree."""

from __future__ import annotations

import json

import grpc
import pytest
from atelier_client import errors

from mesh import errors as mesh_errors
from mesh import status

SERVER = "http://127.0.0.1:8080"


class QuotaExceeded(mesh_errors.ResourceExhausted):
    reason = "QUOTA_EXCEEDED"


FULL = QuotaExceeded("Nothing is left.", metadata={"limit": "100"}, retry_after_seconds=2.5)


def failed(code: grpc.StatusCode, text: str, *trailing: tuple[str, str | bytes]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=text)


def test_a_refused_call_keeps_class_reason_metadata_and_patience() -> None:
    trailing = (*status.to_trailers(FULL), ("x-request-id", "req-1"))

    error = errors.from_call(failed(grpc.StatusCode.RESOURCE_EXHAUSTED, "", *trailing), SERVER)

    assert isinstance(error, errors.ResourceExhausted)
    assert (error.message, error.reason, error.metadata) == ("Nothing is left.", "QUOTA_EXCEEDED", {"limit": "100"})
    assert (error.retry_after_seconds, error.request_id) == (2.5, "req-1")


def test_a_refused_request_says_the_same_as_a_refused_call() -> None:
    body = json.dumps(status.to_json(FULL)).encode()

    error = errors.from_response(429, {"x-request-id": "req-1"}, body)

    assert isinstance(error, errors.ResourceExhausted)
    assert (error.message, error.reason, error.metadata) == ("Nothing is left.", "QUOTA_EXCEEDED", {"limit": "100"})
    assert (error.retry_after_seconds, error.request_id) == (2.5, "req-1")


def test_every_code_of_the_mesh_has_a_class() -> None:
    for code, kind in mesh_errors.BY_CODE_NUMBER.items():
        error = errors.from_response(400, {}, json.dumps({"code": code, "message": "No."}).encode())

        assert isinstance(error, errors.Refused)
        assert (type(error).__name__, error.reason) == (kind.__name__, kind.code)


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff\xfe", b"[1]"])
def test_what_is_no_refusal_of_ours_goes_by_its_http_status(body: bytes) -> None:
    error = errors.from_response(502, {"retry-after": "3"}, body)

    assert isinstance(error, errors.Unavailable)
    assert error.retry_after_seconds == 3


def test_a_call_that_no_one_answered_is_unreachable_with_its_cause() -> None:
    text = "failed to connect to all addresses; last error: UNKNOWN: connect: Connection refused (111)"

    error = errors.from_call(failed(grpc.StatusCode.UNAVAILABLE, text), SERVER)

    assert isinstance(error, errors.Unreachable)
    assert error.metadata == {"server": SERVER, "why": "Connection refused (111)"}


def test_an_answer_that_a_service_is_away_is_no_unreachable_server() -> None:
    error = errors.from_call(failed(grpc.StatusCode.UNAVAILABLE, "No.", ("server", "envoy")), SERVER)

    assert isinstance(error, errors.Unavailable)


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
def test_a_stream_that_the_edge_resets_is_a_server_that_is_away(code: grpc.StatusCode) -> None:
    text = "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))"

    error = errors.from_call(failed(code, text, ("x-request-id", "id-1")), SERVER)

    assert (type(error), error.request_id) == (errors.Unavailable, "id-1")


def test_for_programs_an_error_looks_as_the_server_would_put_it() -> None:
    error = errors.from_response(429, {}, json.dumps(status.to_json(FULL)).encode()).to_json()

    theirs = status.to_json(FULL)
    assert (error["code"], error["message"]) == (theirs["code"], theirs["message"])
    assert error["details"][0] == theirs["details"][0]
