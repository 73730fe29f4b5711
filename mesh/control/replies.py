"""What the edge itself answers when it refuses: in JSON like a service's refusal, or as a gRPC status. Pure."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from mesh.control.faults import ERRORS
from mesh.control.snapshot import ENVOY, Spec
from mesh.status import DETAILS_KEY, DOMAIN

RETRY_AFTER_SECONDS = 1

_UNIMPLEMENTED = 12


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason for which the edge refuses.

    `when` is an expression (CEL) on the local reply; a route named after the reason refuses for it, too.
    `said` keeps the sentence that Envoy made, which names the place of the mistake.
    """

    reason: str
    http_status: int
    code: int
    message: str
    when: str = "false"
    said: bool = False
    grpc_code: int | None = None
    headers: Mapping[str, str] | None = None

    def json(self, **metadata: str) -> dict[str, Any]:
        """Return the body of the answer to a caller of the JSON interface."""
        return {
            "code": self.code,
            "message": f"{self.message}%LOCAL_REPLY_BODY%" if self.said else self.message,
            "details": [
                {
                    "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                    "reason": self.reason,
                    "domain": DOMAIN,
                    "metadata": metadata,
                }
            ],
        }

    def grpc_headers(self) -> dict[str, str]:
        """Return what tells a gRPC caller the same; Envoy makes `grpc-message` of the body."""
        code = self.code if self.grpc_code is None else self.grpc_code
        info = any_pb2.Any()
        info.Pack(error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN))
        status = status_pb2.Status(code=code, message=self.message, details=[info])
        details = base64.b64encode(status.SerializeToString(deterministic=True)).decode()
        return {"grpc-status": str(code), DETAILS_KEY: details}


_CHALLENGE = {"www-authenticate": "Bearer"}
_LATER = {"retry-after": str(RETRY_AFTER_SECONDS)}
_DETAILS = "response.code_details"

TOKEN_MISSING = Refusal(
    "TOKEN_MISSING", 401, 16, "Sign in first: send `Authorization: Bearer <access token>`.",
    when=f"{_DETAILS} == 'jwt_authn_access_denied{{Jwt_is_missing}}'", headers=_CHALLENGE,
)  # fmt: skip
TOKEN_EXPIRED = Refusal(
    "TOKEN_EXPIRED", 401, 16, "The access token has expired; refresh it.",
    when=f"{_DETAILS} == 'jwt_authn_access_denied{{Jwt_is_expired}}'", headers=_CHALLENGE,
)  # fmt: skip
REVOKED = "revoked"
"""What the rule is called by which the edge refuses revoked tokens."""
TOKEN_REVOKED = Refusal(
    "TOKEN_REVOKED", 401, 16, "This access token has been revoked; refresh it, or sign in again.",
    when=f"{_DETAILS} == 'rbac_access_denied_matched_policy[{REVOKED}]'", headers=_CHALLENGE,
)  # fmt: skip
TOKEN_INVALID = Refusal(
    "TOKEN_INVALID", 401, 16, "The access token is not one of ours; sign in again.",
    when=f"{_DETAILS}.startsWith('jwt_authn_access_denied')", headers=_CHALLENGE,
)  # fmt: skip
ROLE_REQUIRED = Refusal(
    "ROLE_REQUIRED", 403, 7, "Only an administrator may do this.", when=f"{_DETAILS}.startsWith('rbac_access_denied')"
)
RATE_LIMITED = Refusal(
    "RATE_LIMITED", 429, 8, "Too many requests; try again in a second.",
    when=f"{_DETAILS} == 'local_rate_limited'", headers=_LATER,
)  # fmt: skip
BODY_TOO_LARGE = Refusal(
    "BODY_TOO_LARGE", 413, 3, "The body is larger than this call takes.",
    when="response.code == 413",
)  # fmt: skip
HEADERS_TOO_LARGE = Refusal(
    "HEADERS_TOO_LARGE", 431, 3, "The headers are larger than 60 KiB.", when="response.code == 431"
)
QUERY_MALFORMED = Refusal(
    "QUERY_MALFORMED", 400, 3, "The query does not fit this call. ",
    when=f"{_DETAILS}.startsWith('early_grpc_json_transcode')", said=True,
)  # fmt: skip
BODY_MALFORMED = Refusal(
    "BODY_MALFORMED", 400, 3, "The request does not fit this call. ",
    when=f"{_DETAILS}.startsWith('grpc_json_transcode')", said=True,
)  # fmt: skip
ROUTE_NOT_FOUND = Refusal(
    "ROUTE_NOT_FOUND", 404, 5, "There is nothing here; /openapi.json lists what there is.", grpc_code=_UNIMPLEMENTED
)
METHOD_NOT_ALLOWED = Refusal("METHOD_NOT_ALLOWED", 405, 12, "This path is called otherwise; see the header `Allow`.")
REQUEST_TIMEOUT = Refusal(
    "REQUEST_TIMEOUT", 408, 4, "The request did not come to its end: nothing arrived for too long.",
    when="response.code == 408",
)  # fmt: skip
TIMEOUT = Refusal("TIMEOUT", 504, 4, "The service did not answer in time.", when="response.code == 504")
SERVICE_UNAVAILABLE = Refusal(
    "SERVICE_UNAVAILABLE", 503, 14, "The service is not there at the moment; try again.",
    when="response.code >= 500", headers=_LATER,
)  # fmt: skip
REQUEST_MALFORMED = Refusal(
    "REQUEST_MALFORMED", 400, 3, "This is not a request that can be read.", when="response.code >= 400"
)

_FAULTS = tuple(
    Refusal(
        "FAULT_INJECTED", error.http_status, error.code_number, f"A fault was injected on purpose: {error.code}.",
        when=f"{_DETAILS} == 'fault_filter_abort' && response.code == {error.http_status}", headers=_LATER,
    )
    for error in ERRORS.values()
)  # fmt: skip

REFUSALS = (
    *_FAULTS,
    TOKEN_MISSING, TOKEN_EXPIRED, TOKEN_INVALID, TOKEN_REVOKED, ROLE_REQUIRED, RATE_LIMITED, BODY_TOO_LARGE,
    HEADERS_TOO_LARGE, QUERY_MALFORMED, BODY_MALFORMED, ROUTE_NOT_FOUND, METHOD_NOT_ALLOWED,
    REQUEST_TIMEOUT, TIMEOUT,
    SERVICE_UNAVAILABLE, REQUEST_MALFORMED,
)  # fmt: skip
"""The first one that fits is answered: the general ones are last."""

# The transcoder turns a JSON request into a gRPC one under the caller's feet; it leaves the path it found here.
_NATIVE = (
    "request.headers['content-type'].startsWith('application/grpc') && !('x-envoy-original-path' in request.headers)"
)


def local_replies() -> Spec:
    """Return Envoy's `local_reply_config`."""
    mappers: list[Spec] = []
    for refusal in REFUSALS:
        # A direct response is the router's own words unless its route is named after a refusal.
        when = f"(xds.route_name == '{refusal.reason}' || {_DETAILS} != 'direct_response' && {refusal.when})"
        mappers.append(
            {
                "filter": _cel(f"{when} && {_NATIVE}"),
                "headers_to_add": _added({**(refusal.headers or {}), **refusal.grpc_headers()}),
                "body": {"inline_string": refusal.message},
                "body_format_override": {"text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"}},
            }
        )
        mappers.append(
            {
                "filter": _cel(when),
                "status_code": refusal.http_status,
                "headers_to_add": _added(refusal.headers or {}),
                "body_format_override": {"json_format": refusal.json(), "content_type": "application/json"},
            }
        )
    return {"mappers": mappers}


def _cel(expression: str) -> Spec:
    return {
        "extension_filter": {
            "name": "cel",
            "typed_config": {
                "@type": f"{ENVOY}.extensions.access_loggers.filters.cel.v3.ExpressionFilter",
                "expression": expression,
            },
        }
    }


def _added(headers: Mapping[str, str]) -> list[Spec]:
    return [
        {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        for key, value in headers.items()
    ]
