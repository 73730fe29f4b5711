"""What stands between the wire and a handler, for gRPC and for HTTP: caller, user, role, and their audit."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace

import uuid_utils

from mesh import context, telemetry, urls
from mesh.context import Request
from mesh.contract import Method
from mesh.errors import DeadlineExceeded, Internal, MeshError, PermissionDenied, Unavailable
from mesh.identity import Verifier
from mesh.intentions import Intentions

log = logging.getLogger(__name__)
audit_log = logging.getLogger("atelier.audit")

ADMIN = "ROLE_ADMIN"


class CallerNotAllowed(PermissionDenied):
    reason = "CALLER_NOT_ALLOWED"


class RoleRequired(PermissionDenied):
    reason = "ROLE_REQUIRED"


class Draining(Unavailable):
    reason = "DRAINING"


def admit(
    method: Method,
    caller: str,
    metadata: Mapping[str, str],
    verifier: Verifier,
    intentions: Intentions,
    *,
    seconds: float | None,
    draining: asyncio.Event | None = None,
    target: str | None = None,
) -> Request:
    """Make the request that `metadata` describes the present one, and return it if the policy of `method` lets it in.

    Args:
        method: what is called.
        caller: the service that calls, by its certificate; empty for one of no mesh.
        metadata: metadata or headers, by lower-case key.
        verifier: checks the token.
        intentions: may take back what the policy allows, and nothing else.
        seconds: what the caller left of its time; None for no limit of its own.
        draining: set when this instance stops; None for a listener whose calls never only wait.
        target: the URL that a signature in `metadata` must be of; None when another service passes it on.

    Raises:
        CallerNotAllowed, RoleRequired, and whatever `Intentions.require_allowed` and `Verifier.user` raise.
    """
    request = Request(
        caller=caller,
        user=None,
        request_id=metadata.get("x-request-id") or str(uuid_utils.uuid4()),
        deadline=time.monotonic() + min(method.deadline_seconds, math.inf if seconds is None else seconds),
        metadata=metadata,
        draining=draining or asyncio.Event(),
    )
    context.serve(request)
    if not method.allows(request.caller):
        raise CallerNotAllowed(
            f"{request.caller or 'A stranger'} may not call {method.full_name}.",
            metadata={"caller": request.caller, "method": method.full_name},
        )
    intentions.require_allowed(request.caller)
    if method.access in ("USER", "ADMIN"):
        signature = metadata.get(urls.SIGNATURE_KEY) if method.signed_url else None
        user = verifier.signed(signature, target) if signature else verifier.user(metadata.get("authorization"))
        request = replace(request, user=user)
        context.serve(request)
        if method.access == "ADMIN" and user.role != ADMIN:
            raise RoleRequired(
                "Only an administrator may do this.", metadata={"required_role": ADMIN, "role": user.role}
            )  # fmt: skip
    return request


def late(method: Method) -> DeadlineExceeded:
    """Return what a caller is told whose call took too long."""
    return DeadlineExceeded(f"{method.full_name} did not finish in time.", metadata={"method": method.full_name})


def internal(error: Exception, method: Method) -> Internal:
    """Log a bug with its traceback and return what its caller may know of it."""
    log.error("%s failed", method.full_name, exc_info=error)
    request = context.present()
    request_id = request.request_id if request else ""
    return Internal(
        f"Something went wrong on our side. If it stays, report the request id {request_id}.",
        metadata={"request_id": request_id},
    )


def ended(method: Method, failure: MeshError) -> None:
    """Tell the trace and the audit of a call that ends badly."""
    telemetry.failed(failure.reason)
    audit(method, failure)


def audit(method: Method, failure: MeshError | None) -> None:
    """Write down who called an audited rpc, and what came of it."""
    if method.audited:
        request = context.present()
        audit_log.info(
            "%s",
            method.full_name,
            extra={
                "caller": request.caller if request else "",
                "user_id": request.user.user_id if request and request.user else "",
                "outcome": failure.reason if failure else "OK",
            },
        )
