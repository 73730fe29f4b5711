"""Between atelier.user.v1 and the domain. Nothing is decided here but what the wire's words mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from atelier.task.v1 import task_pb2
from atelier.user.v1 import user_pb2 as pb
from email_validator import EmailNotValidError, validate_email

from mesh import paging
from mesh.wire import timestamp
from services.user.domain import (
    Account,
    Drift,
    EmailMalformed,
    FieldNotUpdatable,
    Kind,
    Reservation,
    Role,
    State,
    Status,
    Usage,
    require_etag,
    reset_time,
)

_ROLES = {getattr(pb.User, f"ROLE_{role.name}"): role for role in Role}
_STATUSES = {getattr(pb.User, f"STATUS_{status.name}"): status for status in Status}
_KINDS = {getattr(pb.ReserveQuotaRequest, f"KIND_{kind.name}"): kind for kind in Kind}
# What a reservation becomes by its task's state; a task that has not ended is still to be charged.
_ENDS = {
    task_pb2.Task.STATE_SUCCEEDED: State.SETTLED,
    task_pb2.Task.STATE_FAILED: State.RELEASED,
    task_pb2.Task.STATE_CANCELLED: State.RELEASED,
}

UPDATABLE = ("email", "display_name")


def email_from(text: str) -> str:
    """Return an address in its normal form. Only its syntax is looked at, not whether mail arrives."""
    try:
        return validate_email(text, check_deliverability=False).normalized
    except EmailNotValidError as error:
        raise EmailMalformed(
            f"{text} is not an email address: {error}", metadata={"email": text}, violations={"email": str(error)}
        ) from None


def login_from(text: str) -> str:
    """Return a username or an address in the form it is stored in; nonsense stays what it is, and is nobody's."""
    try:
        return email_from(text)
    except EmailMalformed:
        return text


def updated(account: Account, request: pb.UpdateUserRequest) -> Account:
    """Return `account` with the fields that the request names."""
    require_etag(account, request.user.etag)
    # JSON writes a mask's paths in camel case in a body and as it likes in a query.
    paths = ["display_name" if path == "displayName" else path for path in request.update_mask.paths]
    for path in paths:
        if path not in UPDATABLE:
            raise FieldNotUpdatable(
                f"{path} cannot be changed here; {' and '.join(UPDATABLE)} can.",
                metadata={"field": path, "updatable": ", ".join(UPDATABLE)},
                violations={path: "cannot be changed"},
            )
    changes = {path: getattr(request.user, path) for path in paths or UPDATABLE}
    if not paths:
        changes = {path: value for path, value in changes.items() if value}
    if "email" in changes:
        changes["email"] = email_from(changes["email"])
    return replace(account, **changes)


def limited(account: Account, request: pb.SetLimitsRequest) -> Account:
    """Return `account` with the request's own limits; a limit that is not set is the role's."""
    limits = {}
    if request.HasField("tasks"):
        limits[Kind.TASKS] = request.tasks
    if request.HasField("storage_bytes"):
        limits[Kind.STORAGE_BYTES] = request.storage_bytes
    return replace(account, limits=limits)


def promoted(account: Account, request: pb.SetRoleRequest) -> Account:
    """Return `account` with the request's role and status; what is not set stays."""
    return replace(
        account,
        role=_ROLES.get(request.role, account.role),
        status=_STATUSES.get(request.status, account.status),
    )


def kind_from(kind: pb.ReserveQuotaRequest.Kind.ValueType) -> Kind:
    return _KINDS[kind]


def role_to_proto(role: Role) -> pb.User.Role.ValueType:
    return pb.User.Role.Value(f"ROLE_{role.name}")


def role_name(role: Role) -> str:
    """Return the role as the access token's claim says it."""
    return f"ROLE_{role.name}"


def status_to_proto(status: Status) -> pb.User.Status.ValueType:
    return pb.User.Status.Value(f"STATUS_{status.name}")


def user_to_proto(account: Account, usage: Mapping[Kind, Usage], now: datetime) -> pb.User:
    return pb.User(
        user_id=account.user_id,
        username=account.username,
        email=account.email,
        display_name=account.display_name,
        role=role_to_proto(account.role),
        status=status_to_proto(account.status),
        quota=quota_to_proto(account, usage, now),
        create_time=timestamp(account.create_time),
        etag=str(account.version),
    )


def quota_to_proto(account: Account, usage: Mapping[Kind, Usage], now: datetime) -> pb.Quota:
    return pb.Quota(
        tasks=_metric(account, Kind.TASKS, usage),
        storage_bytes=_metric(account, Kind.STORAGE_BYTES, usage),
        reset_time=timestamp(reset_time(now)),
    )


def _metric(account: Account, kind: Kind, usage: Mapping[Kind, Usage]) -> pb.Quota.Metric:
    return pb.Quota.Metric(limit=account.limit(kind), used=usage[kind].used, reserved=usage[kind].reserved)


def account_to_proto(account: Account) -> pb.Account:
    return pb.Account(
        user_id=account.user_id,
        role=role_to_proto(account.role),
        status=status_to_proto(account.status),
        generation=account.generation_id,
    )


def lookup_of(reservation_id: str) -> task_pb2.LookupTaskRequest:
    """Return the question after the task of a reservation, `<task id>/<round>`."""
    return task_pb2.LookupTaskRequest(task_id=reservation_id.rpartition("/")[0])


def fate_from(reservation_id: str, task: task_pb2.LookupTaskResponse) -> State:
    """Return what becomes of a reservation by its task."""
    if task.reservation_id != reservation_id:
        return State.RELEASED  # the task was queued again under another one: this one's round has ended
    return _ENDS.get(task.state, State.BOUND)


def audit_place_from(page_token: str) -> str:
    """Return the last reservation of the page before; empty when there is none.

    Raises:
        PageTokenMalformed: the token is not one of an audit.
    """
    [reservation_id] = paging.decode(page_token, (str,)) if page_token else [""]
    return str(reservation_id)


def audit_page_token(reservations: Sequence[Reservation], size: int) -> str:
    """Return the token of the page after `reservations`; empty when there is none."""
    return paging.encode([reservations[-1].reservation_id]) if len(reservations) == size else ""


def drift_to_proto(drift: Drift) -> pb.AuditQuotasResponse.Drift:
    def amounts(usage: Usage) -> pb.AuditQuotasResponse.Amounts:
        return pb.AuditQuotasResponse.Amounts(used=usage.used, reserved=usage.reserved)

    return pb.AuditQuotasResponse.Drift(
        user_id=drift.user_id,
        metric=drift.kind,
        period=drift.period,
        counter=amounts(drift.counter),
        ledger=amounts(drift.ledger),
        reservations=amounts(drift.reservations),
    )


def dispute_to_proto(reservation: Reservation, wanted: State) -> pb.AuditQuotasResponse.Dispute:
    return pb.AuditQuotasResponse.Dispute(
        reservation_id=reservation.reservation_id,
        state=state_to_proto(reservation.state),
        wanted_state=state_to_proto(wanted),
    )


def state_to_proto(state: State) -> pb.Reservation.State.ValueType:
    return pb.Reservation.State.Value(f"STATE_{state.name}")


def reservation_to_proto(reservation: Reservation) -> pb.Reservation:
    return pb.Reservation(reservation_id=reservation.reservation_id, state=state_to_proto(reservation.state))
