"""What an account is, what its role lets it do, and how its quota is counted. No I/O, no protobuf."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Protocol

from mesh.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
)

GIB = 1024**3

FORGET = "forget"  # the work that one replica does for all: the name of its lock and of its fence
HOLD_BEFORE_ASKING = timedelta(minutes=2)
"""How long a held reservation is left alone. The task service commits no task more than a minute after its reserve."""
BOUND_BEFORE_ASKING = timedelta(hours=1)
"""How long a bound one is: the event of its task's end comes within a second, unless the broker has lost it."""
RELEASED_WITHIN = timedelta(seconds=1)
"""How soon what a cancelled task had set aside is free: it is given back by an event, as a rule in half a second."""


class UsernameTaken(AlreadyExists):
    reason = "USERNAME_TAKEN"


class EmailTaken(AlreadyExists):
    reason = "EMAIL_TAKEN"


class EmailMalformed(InvalidArgument):
    reason = "EMAIL_MALFORMED"


class PasswordTooWeak(InvalidArgument):
    reason = "PASSWORD_TOO_WEAK"


class CredentialsInvalid(Unauthenticated):
    reason = "CREDENTIALS_INVALID"


class AccountDisabled(PermissionDenied):
    reason = "ACCOUNT_DISABLED"


class SecretInvalid(PermissionDenied):
    reason = "SECRET_INVALID"


class IdempotencyKeyReused(FailedPrecondition):
    reason = "IDEMPOTENCY_KEY_REUSED"


class PasswordsBusy(ResourceExhausted):
    reason = "PASSWORDS_BUSY"


class UserNotFound(NotFound):
    reason = "USER_NOT_FOUND"


class FieldNotUpdatable(InvalidArgument):
    reason = "FIELD_NOT_UPDATABLE"


class EtagMismatch(Aborted):
    reason = "ETAG_MISMATCH"


class PermissionUnknown(InvalidArgument):
    reason = "PERMISSION_UNKNOWN"


class QuotaExceeded(ResourceExhausted):
    reason = "QUOTA_EXCEEDED"


class ReservationNotFound(NotFound):
    reason = "RESERVATION_NOT_FOUND"


class ReservationReleased(FailedPrecondition):
    reason = "RESERVATION_RELEASED"


class Role(StrEnum):
    USER = "user"
    VIP = "vip"
    ADMIN = "admin"


class Status(StrEnum):
    ACTIVE = "active"
    DISABLED = "disabled"


class Kind(StrEnum):
    """What is counted. The values are the names of the metrics in refusals."""

    TASKS = "tasks"
    STORAGE_BYTES = "storage_bytes"


class State(StrEnum):
    """Where a reservation stands: HELD → BOUND → SETTLED or RELEASED, in any order of arrival."""

    HELD = "held"
    BOUND = "bound"
    SETTLED = "settled"
    RELEASED = "released"


ROLE_LIMITS: Mapping[Role, Mapping[Kind, int]] = {
    Role.USER: {Kind.TASKS: 100, Kind.STORAGE_BYTES: 1 * GIB},
    Role.VIP: {Kind.TASKS: 5_000, Kind.STORAGE_BYTES: 100 * GIB},
    Role.ADMIN: {Kind.TASKS: 5_000, Kind.STORAGE_BYTES: 100 * GIB},
}

_EVERYONE = frozenset({Role.USER, Role.VIP, Role.ADMIN})
PERMISSIONS: Mapping[str, frozenset[Role]] = {
    "tasks.create": _EVERYONE,
    "tasks.read": _EVERYONE,
    "files.create": _EVERYONE,
    "files.read": _EVERYONE,
    "users.administer": frozenset({Role.ADMIN}),
    "keys.rotate": frozenset({Role.ADMIN}),
}


@dataclass(frozen=True, slots=True)
class Account:
    """A person's account. `limits` holds only what differs from the role's; `version` grows with every change.

    `generation` grows with every change of role or status: access tokens name the one that they were issued for.
    """

    user_id: str
    username: str
    email: str
    password_hash: str = field(repr=False)
    create_time: datetime
    display_name: str = ""
    role: Role = Role.USER
    status: Status = Status.ACTIVE
    limits: Mapping[Kind, int] = field(default_factory=dict)
    version: int = 1
    generation: int = 1

    @property
    def generation_id(self) -> str:
        """What tokens and the auth service know a generation by."""
        return f"{self.user_id}/{self.generation}"

    def limit(self, kind: Kind) -> int:
        """Return the most that may be used and reserved together."""
        return self.limits.get(kind, ROLE_LIMITS[self.role][kind])


@dataclass(frozen=True, slots=True)
class Usage:
    """What is charged and what is set aside."""

    used: int = 0
    reserved: int = 0


@dataclass(frozen=True, slots=True)
class Reservation:
    """An amount set aside. `period` is the month it counts in; empty for what has no months."""

    reservation_id: str
    user_id: str
    kind: Kind
    period: str
    amount: int
    state: State = State.HELD


@dataclass(frozen=True, slots=True)
class Move:
    """A change of a reservation's state and what it does to the counters."""

    state: State
    used: int
    reserved: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where an event brings a reservation."""

    event_id: str
    reservation_id: str
    target: State


@dataclass(frozen=True, slots=True)
class Drift:
    """One thing that is counted, where three ways to count it come to different sums."""

    user_id: str
    kind: Kind
    period: str
    counter: Usage
    ledger: Usage
    reservations: Usage


class Accounts(Protocol):
    """Where accounts are kept."""

    async def register(self, account: Account, *, request_id: str) -> Account:
        """Store `account`, or return what the first call with `request_id` stored.

        Raises:
            UsernameTaken, EmailTaken: somebody else has it.
        """

    async def get(self, user_id: str) -> Account:
        """Return an account, or raise `UserNotFound`."""

    async def find(self, login: str) -> Account | None:
        """Return the account whose username or email this is, without regard to case."""

    async def change(self, user_id: str, change: Callable[[Account], Account]) -> Account:
        """Store what `change` makes of the present account, as its next version.

        If that ends a generation, remember to have it revoked.

        Raises:
            UserNotFound: there is none.
            EmailTaken: somebody else has the new address.
        """

    async def rehash(self, user_id: str, *, old: str, new: str) -> None:
        """Replace a password's hash, unless it has changed meanwhile."""

    async def ended_generations(self) -> list[str]:
        """Return the generations that are still to be revoked, some at a time."""

    async def note_revoked(self, generation_id: str) -> None:
        """Note that a generation has been revoked."""

    async def forget(self, fence: int) -> None:
        """Drop what is kept only to recognise repeated requests and events that can no longer come.

        `fence` is of the work FORGET.
        """


class Quotas(Protocol):
    """Where usage is counted. All but `usage` write one ledger row for each change of a counter."""

    async def usage(self, user_id: str, now: datetime) -> Mapping[Kind, Usage]:
        """Return the usage of the present period."""

    async def reserve(
        self,
        reservation_ids: Sequence[str],
        user_id: str,
        kind: Kind,
        amount: int,
        now: datetime,
        *,
        charge: bool = False,
    ) -> list[Reservation]:
        """Set an amount aside for each reservation, all or none, or `charge` it at once; return them in order.

        One that is only held is held anew from `now`, or charged; one that is bound or charged is returned as it is; a
        released one is set aside again, so that a create repeated after its reservation was given back still counts.

        Raises:
            UserNotFound: there is no such account.
            QuotaExceeded: they do not fit.
            ReservationReleased: one that is to be charged was given back.
        """

    async def release(self, reservation_id: str, user_id: str, now: datetime) -> None:
        """Give a reservation back, or a charge for stored bytes; from then on it cannot be charged at once.

        So it is with one that is not there: whoever gives up while it is being made knows that nothing is charged.
        With an empty `user_id` only what is there is given back.
        """

    async def move(self, reservation_id: str, target: State, now: datetime) -> Reservation | None:
        """Bring a reservation to `target` if it may go there, and return it; None when there is no such one."""

    async def follow(self, outcomes: Sequence[Outcome], now: datetime) -> None:
        """`move` for each in turn, all or none, and once for an event however often it arrives."""

    async def resolve(self, reservation_id: str, target: State, now: datetime) -> None:
        """`move`, and leave alone for as long again, unless the reservation is no longer `overdue`."""

    async def audit(self) -> list[Drift]:
        """Return what is not counted alike by counters, ledger and reservations, some of it; empty when all is well."""

    async def of_tasks(self, after: str, held_before: datetime, at_most: int) -> list[Reservation]:
        """Return reservations of tasks whose ids follow `after`, by id, but for those held since `held_before`."""

    async def overdue(self, now: datetime) -> list[str]:
        """Return reservations of tasks that have been held or bound for long, some at a time: first those held."""


class Passwords(Protocol):
    """Hashes and checks passwords, slowly by design. Raises PasswordsBusy when too many wait."""

    async def hashed(self, password: str) -> str: ...

    async def matches(self, password_hash: str | None, password: str) -> bool:
        """Tell whether the password is right; takes as long, and says no, when there is no hash."""

    def outdated(self, password_hash: str) -> bool:
        """Tell whether a hash was made with other parameters than today's."""


def require_strong(password: str, *, username: str, email: str) -> None:
    """Refuse the passwords that are guessed first. The contract bounds the length."""
    folded = password.casefold()
    if folded in {username.casefold(), email.casefold(), email.partition("@")[0].casefold()} or len(set(folded)) == 1:
        raise PasswordTooWeak(
            "Choose a password that is neither your name or address nor one character repeated.",
            violations={"password": "too easy to guess"},
        )


def require_active(account: Account) -> None:
    if account.status is not Status.ACTIVE:
        raise AccountDisabled("This account is disabled; ask an administrator.", metadata={"user_id": account.user_id})


def succeeded(present: Account, changed: Account) -> Account:
    """Return the next version of `present`, which `changed` says, and the next generation if it may do other things."""
    same = (present.role, present.status) == (changed.role, changed.status)
    return replace(changed, version=present.version + 1, generation=present.generation + (0 if same else 1))


def require_etag(account: Account, etag: str) -> None:
    """Refuse an edit of a version that is no longer the present one."""
    if etag and etag != str(account.version):
        raise EtagMismatch(
            f"The account has changed: its etag is {account.version}, not {etag}. Read it again.",
            metadata={"etag": str(account.version), "given": etag},
        )


def allowed(account: Account, permission: str) -> bool:
    """Tell whether an account may do something.

    Raises:
        PermissionUnknown: nobody has defined that.
    """
    if permission not in PERMISSIONS:
        raise PermissionUnknown(
            f"There is no permission {permission}; there are {', '.join(PERMISSIONS)}.",
            metadata={"permission": permission, "known": ", ".join(PERMISSIONS)},
        )
    return account.status is Status.ACTIVE and account.role in PERMISSIONS[permission]


def disputed(state: State, wanted: State, *, task_is_known: bool) -> bool:
    """Tell whether a reservation stands where it should not, by its task.

    Until the task's first event has come it is HELD, not BOUND. A task that is not known may have been kept for its
    time and be gone; then whatever is final is right.
    """
    if not task_is_known:
        return state in (State.HELD, State.BOUND)
    return state is not wanted and (state, wanted) != (State.HELD, State.BOUND)


def not_found(user_id: str) -> UserNotFound:
    return UserNotFound(f"There is no user {user_id}.", metadata={"user_id": user_id})


def require_charged(reservation_id: str, reservation: Reservation | None) -> Reservation:
    """Refuse to call charged what is not."""
    if reservation is None:
        raise ReservationNotFound(
            f"There is no reservation {reservation_id}.", metadata={"reservation_id": reservation_id}
        )
    if reservation.state is not State.SETTLED:
        raise given_back(reservation_id)
    return reservation


def given_back(reservation_id: str) -> ReservationReleased:
    return ReservationReleased(
        f"The reservation {reservation_id} was given back.", metadata={"reservation_id": reservation_id}
    )


def period(kind: Kind, now: datetime) -> str:
    """Return the period that something used now counts in: the month in UTC for tasks, none for storage."""
    return f"{now.astimezone(UTC):%Y-%m}" if kind is Kind.TASKS else ""


def reset_time(now: datetime) -> datetime:
    """Return the start of the next month in UTC."""
    month = now.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (month + timedelta(days=31)).replace(day=1)


def exceeded(account: Account, kind: Kind, usage: Usage, amount: int, now: datetime) -> QuotaExceeded:
    """Return the refusal of an amount that does not fit. `used` counts what is set aside, as the limit does."""
    limit, used = account.limit(kind), usage.used + usage.reserved
    wait: timedelta | None = None  # storage is freed by deleting, and what is too much for an empty month is so for all
    if usage.used + amount <= limit:
        wait = RELEASED_WITHIN  # only what is set aside is in the way, perhaps of a task that was cancelled just now
    elif kind is Kind.TASKS and amount <= limit:
        wait = reset_time(now) - now
    return QuotaExceeded(
        f"The quota of {kind.value} is {limit}: {used} used, {amount} more asked for.",
        metadata={"metric": kind.value, "limit": str(limit), "used": str(used), "requested": str(amount)},
        retry_after_seconds=None if wait is None else wait.total_seconds(),
    )


def moved(reservation: Reservation, target: State) -> Move | None:
    """Return what bringing a reservation to `target` changes; None when it changes nothing.

    Events arrive in any order and more than once, so what is final stays: only the charge for stored bytes is
    given back, when the file is deleted.
    """
    amount = reservation.amount
    match reservation.state, target:
        case State.HELD, State.BOUND:
            return Move(State.BOUND, used=0, reserved=0)
        case ((State.HELD | State.BOUND), State.SETTLED):
            return Move(State.SETTLED, used=amount, reserved=-amount)
        case ((State.HELD | State.BOUND), State.RELEASED):
            return Move(State.RELEASED, used=0, reserved=-amount)
        case State.SETTLED, State.RELEASED if reservation.kind is Kind.STORAGE_BYTES:
            return Move(State.RELEASED, used=-amount, reserved=0)
        case _:
            return None
