"""Accounts and quotas in a SQL database."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    Table,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh import crash, idempotency, inbox, lock
from mesh.database import Database, insert_if_absent
from mesh.errors import MeshError
from mesh.together import Together
from services.user.domain import (
    BOUND_BEFORE_ASKING,
    FORGET,
    HOLD_BEFORE_ASKING,
    Account,
    Drift,
    EmailTaken,
    Kind,
    Outcome,
    QuotaExceeded,
    Reservation,
    ReservationReleased,
    Role,
    State,
    Status,
    Usage,
    UsernameTaken,
    exceeded,
    given_back,
    moved,
    not_found,
    period,
    succeeded,
)
from services.user.tables import account as account_table
from services.user.tables import (
    counter,
    ended_generation,
    idempotency_table,
    inbox_table,
    ledger,
    lock_table,
    reservation,
)

REDELIVERED_WITHIN = timedelta(days=30)
"""An event that waited longer, in a queue nobody served or as a dead letter, finds a reservation that is final."""

REVOKED_AT_ONCE = 100
"""Generations that are told to auth in one round, so that a round stays short."""

DRIFTS_AT_ONCE = 100
"""Drifts in one answer: more than one is a bug already."""

ASKED_AT_ONCE = 100
"""Reservations that upkeep asks about in one round, so that a round stays short."""


RESERVED_TOGETHER = 100
"""Calls whose reservations are made in one transaction."""

# Made once, as all that is sent for each task or four times a second: making a statement costs as much as sending it.
_ENDED_GENERATIONS = select(ended_generation.c.generation_id).limit(REVOKED_AT_ONCE)
# Locks are taken in one order: two who lock the same rows wait and do not meet crosswise.
_LOCK_ACCOUNTS = (
    select(account_table)
    .where(account_table.c.user_id.in_(bindparam("user_ids", expanding=True)))
    .order_by(account_table.c.user_id)
    .with_for_update()
)
_LOCK_RESERVATIONS = (
    select(reservation)
    .where(reservation.c.reservation_id.in_(bindparam("reservation_ids", expanding=True)))
    .order_by(reservation.c.reservation_id)
    .with_for_update()
)
_INSERT_RESERVATION = insert(reservation)
_UPDATE_RESERVATION = update(reservation).where(reservation.c.reservation_id == bindparam("key"))
_INSERT_ENTRY = insert(ledger)
_COUNT = (
    update(counter)
    .where(
        counter.c.user_id == bindparam("of_user"),
        counter.c.kind == bindparam("of_kind"),
        counter.c.period == bindparam("of_period"),
    )
    .values(used=counter.c.used + bindparam("more_used"), reserved=counter.c.reserved + bindparam("more_reserved"))
)
_COUNT_WITHIN = _COUNT.where(
    counter.c.used + counter.c.reserved + bindparam("more_used") + bindparam("more_reserved") <= bindparam("limit")
)


class SqlAccounts:
    """Satisfies `domain.Accounts`. One transaction per method."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def register(self, account: Account, *, request_id: str) -> Account:
        try:
            async with self._database.transaction() as connection:
                if request_id:
                    # Never the password: a fast hash of it would undo the slow one.
                    named = hashlib.sha256(f"{account.username}\n{account.email}".encode()).digest()
                    user_id, fresh = await idempotency.adopt(
                        connection,
                        idempotency_table,
                        # Nobody is signed in yet: strangers who happen to choose the same key must not meet.
                        caller=account.username.casefold(),
                        method="RegisterUser",
                        key=request_id,
                        fingerprint=named,
                        new_id=account.user_id,
                    )
                    if not fresh:
                        return await _account(connection, user_id)
                await connection.execute(insert(account_table).values(_columns(account)))
        except IntegrityError as error:
            raise _taken(error) from error
        return account

    async def get(self, user_id: str) -> Account:
        async with self._database.query() as connection:
            return await _account(connection, user_id)

    async def find(self, login: str) -> Account | None:
        key = login.casefold()
        found = select(account_table).where((account_table.c.username_key == key) | (account_table.c.email_key == key))
        async with self._database.query() as connection:
            row = (await connection.execute(found)).one_or_none()  # a name has no @, an address has one
        return None if row is None else _from_row(row)

    async def change(self, user_id: str, change: Callable[[Account], Account]) -> Account:
        try:
            async with self._database.transaction() as connection:
                present = await _account(connection, user_id, lock=True)
                changed = succeeded(present, change(present))
                await connection.execute(
                    update(account_table).where(account_table.c.user_id == user_id).values(_columns(changed))
                )
                if changed.generation != present.generation:
                    ended = {"generation_id": present.generation_id}
                    await connection.execute(insert(ended_generation).values(ended))
        except IntegrityError as error:
            raise _taken(error) from error
        return changed

    async def rehash(self, user_id: str, *, old: str, new: str) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(
                update(account_table)
                .where(account_table.c.user_id == user_id, account_table.c.password_hash == old)
                .values(password_hash=new)
            )

    async def ended_generations(self) -> list[str]:
        async with self._database.query() as connection:
            return list(await connection.scalars(_ENDED_GENERATIONS))

    async def note_revoked(self, generation_id: str) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(delete(ended_generation).where(ended_generation.c.generation_id == generation_id))

    async def forget(self, fence: int) -> None:
        more = True
        while more:
            async with self._database.transaction() as connection:
                await lock.require(connection, lock_table, FORGET, fence)
                keys = await idempotency.forget(connection, idempotency_table)
                more = await inbox.forget(connection, inbox_table, REDELIVERED_WITHIN) or keys


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Reservations of one account, all or none."""

    reservation_ids: tuple[str, ...]
    user_id: str
    kind: Kind
    amount: int
    now: datetime
    state: State
    """HELD, or SETTLED when it is charged at once."""

    @property
    def counted(self) -> tuple[str, Kind, str, int, State]:
        """What those share that can be set aside by one statement."""
        return self.user_id, self.kind, period(self.kind, self.now), self.amount, self.state


class SqlQuotas:
    """Satisfies `domain.Quotas`. One transaction per method."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._reserved = Together[_Wanted, list[Reservation]](self._reserve_together, at_most=RESERVED_TOGETHER)

    async def usage(self, user_id: str, now: datetime) -> Mapping[Kind, Usage]:
        async with self._database.reading() as connection:
            return {kind: await _usage(connection, user_id, kind, period(kind, now)) for kind in Kind}

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
        state = State.SETTLED if charge else State.HELD
        return await self._reserved(_Wanted(tuple(reservation_ids), user_id, kind, amount, now, state))

    async def _reserve_together(self, wanted: Sequence[_Wanted]) -> list[list[Reservation] | Exception]:
        """Reserve what each wants, whatever becomes of the others."""
        refusals: dict[_Wanted, Exception] = {}
        async with self._database.transaction() as connection:
            # The locks make an account's reservations wait for each other, so that looking before writing is safe.
            accounts = await _accounts(connection, {each.user_id for each in wanted})
            reservations = await _reservations(connection, [each for one in wanted for each in one.reservation_ids])
            alike: defaultdict[tuple[str, Kind, str, int, State], list[_Wanted]] = defaultdict(list)
            for each in wanted:
                alike[each.counted].append(each)
            # In one order, as `_move` locks counters.
            for (user_id, *_), group in sorted(alike.items()):
                account = accounts.get(user_id)
                if account is None:
                    refusals |= dict.fromkeys(group, not_found(user_id))
                    continue
                try:
                    await _hold(connection, account, group, reservations)
                except (QuotaExceeded, ReservationReleased):
                    for each in group:  # the others may be in order
                        try:
                            await _hold(connection, account, [each], reservations)
                        except (QuotaExceeded, ReservationReleased) as refusal:
                            refusals[each] = refusal
            for kind in {each.kind for each in wanted}:
                crash.point(f"quota for {kind}: written")
        for kind in {each.kind for each in wanted}:
            crash.point(f"quota for {kind}: committed")
        return [
            refusals.get(each) or [reservations[reservation_id] for reservation_id in each.reservation_ids]
            for each in wanted
        ]

    async def move(self, reservation_id: str, target: State, now: datetime) -> Reservation | None:
        async with self._database.transaction() as connection:
            return (await _move(connection, [(reservation_id, target)], now)).get(reservation_id)

    async def release(self, reservation_id: str, user_id: str, now: datetime) -> None:
        moves = [(reservation_id, State.RELEASED)]
        async with self._database.transaction() as connection:
            if await _move(connection, moves, now):
                return
            # Perhaps it is being charged: whoever does that has the account's lock, and is waited for here.
            if user_id in await _accounts(connection, [user_id]) and not await _move(connection, moves, now):
                kind = Kind.STORAGE_BYTES  # nothing else is charged at once
                gone = Reservation(reservation_id, user_id, kind, period(kind, now), 0, State.RELEASED)
                await connection.execute(_INSERT_RESERVATION, _reservation_columns(gone, now))

    async def follow(self, outcomes: Sequence[Outcome], now: datetime) -> None:
        targets = {each.target for each in outcomes}
        async with self._database.transaction() as connection:
            fresh = await inbox.first_time(connection, inbox_table, "user.events", (each.event_id for each in outcomes))
            _reach("event noted", targets)
            moves = {each.event_id: (each.reservation_id, each.target) for each in outcomes if each.event_id in fresh}
            await _move(connection, [*moves.values()], now)
            _reach("written", targets)
        _reach("committed", targets)

    async def resolve(self, reservation_id: str, target: State, now: datetime) -> None:
        this = reservation.c.reservation_id == reservation_id
        async with self._database.transaction() as connection:
            # Locked: a repeated `reserve` has it wait anew.
            still = select(reservation.c.reservation_id).where(this, _overdue(now)).with_for_update()
            if (await connection.execute(still)).one_or_none() is not None:
                await _move(connection, [(reservation_id, target)], now)
                await connection.execute(update(reservation).where(this).values(update_time=now))  # bound, still

    async def overdue(self, now: datetime) -> list[str]:
        found = (
            select(reservation.c.reservation_id)
            .where(_overdue(now), reservation.c.kind == Kind.TASKS)  # storage settles its own
            .order_by(reservation.c.state.desc(), reservation.c.update_time)  # held, then bound
            .limit(ASKED_AT_ONCE)
        )
        async with self._database.query() as connection:
            return list((await connection.execute(found)).scalars())

    async def audit(self) -> list[Drift]:
        key, zero = ("user_id", "kind", "period"), literal(0)

        def counted(table: Table, place: int, used: ColumnElement[int], reserved: ColumnElement[int]) -> Select[Any]:
            amounts: list[ColumnElement[int]] = [zero] * 6
            amounts[2 * place : 2 * place + 2] = [used, reserved]
            return select(
                *(table.c[name] for name in key),
                *(amount.label(f"amount_{number}") for number, amount in enumerate(amounts)),
            )

        settled = case((reservation.c.state == State.SETTLED, reservation.c.amount), else_=0)
        standing = case((reservation.c.state.in_((State.HELD, State.BOUND)), reservation.c.amount), else_=0)
        all_three = union_all(
            counted(counter, 0, counter.c.used, counter.c.reserved),
            counted(ledger, 1, ledger.c.used, ledger.c.reserved),
            counted(reservation, 2, settled, standing),
        ).subquery()
        sums = [func.sum(all_three.c[f"amount_{number}"]) for number in range(6)]
        wrong = (
            select(*(all_three.c[name] for name in key), *sums)
            .group_by(*(all_three.c[name] for name in key))
            .having(or_(*(sums[number] != sums[number % 2] for number in range(2, 6))))
            .limit(DRIFTS_AT_ONCE)
        )
        async with self._database.reading() as connection:
            found = (await connection.execute(wrong)).all()
        return [
            Drift(user_id, Kind(kind), period_, *(Usage(*map(int, amounts[place : place + 2])) for place in (0, 2, 4)))
            for user_id, kind, period_, *amounts in found
        ]

    async def of_tasks(self, after: str, held_before: datetime, at_most: int) -> list[Reservation]:
        past = (reservation.c.state != State.HELD) | (reservation.c.update_time < held_before)
        found = (
            select(reservation)
            .where(reservation.c.reservation_id > after, reservation.c.kind == Kind.TASKS, past)
            .order_by(reservation.c.reservation_id)
            .limit(at_most)
        )
        async with self._database.query() as connection:
            return [_from_reservation_row(row) for row in await connection.execute(found)]


def _overdue(now: datetime) -> ColumnElement[bool]:
    """Reservations whose event should have come."""
    state, time = reservation.c.state, reservation.c.update_time
    held = (state == State.HELD) & (time < now - HOLD_BEFORE_ASKING)
    return held | ((state == State.BOUND) & (time < now - BOUND_BEFORE_ASKING))


async def _hold(
    connection: AsyncConnection, account: Account, alike: Sequence[_Wanted], reservations: dict[str, Reservation]
) -> None:
    """Make the `reservations` that are not there, or were released, for some who want alike: all or none.

    Raises:
        QuotaExceeded: together they do not fit.
        ReservationReleased: one is to be charged, and was given back.
    """
    wanted, now = alike[0], max(each.now for each in alike)
    ids = dict.fromkeys(each for one in alike for each in one.reservation_ids)
    released = [each for each in ids if each in reservations and reservations[each].state is State.RELEASED]
    if released and wanted.state is State.SETTLED:
        raise given_back(released[0])
    kept = {each for each in ids if each in reservations} - {*released}
    if held := [each for each in kept if reservations[each].state is State.HELD]:
        if wanted.state is State.SETTLED:
            reservations |= await _move(connection, [(each, State.SETTLED) for each in held], now)
        else:
            # Whoever repeats the call is about to commit what it is for: upkeep waits anew.
            await connection.execute(update(reservation).where(_among(held)).values(update_time=now))
    fresh = [
        Reservation(each, account.user_id, wanted.kind, period(wanted.kind, wanted.now), wanted.amount, wanted.state)
        for each in ids
        if each not in kept
    ]
    if not fresh:
        return
    total = wanted.amount * len(fresh)
    if not await _set_aside(connection, fresh[0], total, account.limit(wanted.kind)):
        usage = await _usage(connection, account.user_id, wanted.kind, fresh[0].period)
        raise exceeded(account, wanted.kind, usage, total, now)
    if released:
        await connection.execute(delete(reservation).where(_among(released)))
    await connection.execute(_INSERT_RESERVATION, [_reservation_columns(each, now) for each in fresh])
    used, reserved = _places(wanted.state, wanted.amount)
    await connection.execute(_INSERT_ENTRY, [_entry(each, used, reserved, now) for each in fresh])
    reservations |= {each.reservation_id: each for each in fresh}


async def _accounts(connection: AsyncConnection, user_ids: Collection[str]) -> dict[str, Account]:
    """Return accounts, locked."""
    found = await connection.execute(_LOCK_ACCOUNTS, {"user_ids": [*user_ids]})
    return {row.user_id: _from_row(row) for row in found}


async def _account(connection: AsyncConnection, user_id: str, *, lock: bool = False) -> Account:
    found = select(account_table).where(account_table.c.user_id == user_id)
    row = (await connection.execute(found.with_for_update() if lock else found)).one_or_none()
    if row is None:
        raise not_found(user_id)
    return _from_row(row)


async def _reservations(connection: AsyncConnection, reservation_ids: Sequence[str]) -> dict[str, Reservation]:
    found = await connection.execute(_LOCK_RESERVATIONS, {"reservation_ids": reservation_ids})
    return {row.reservation_id: _from_reservation_row(row) for row in found}


async def _usage(connection: AsyncConnection, user_id: str, kind: Kind, period: str) -> Usage:
    row = (await connection.execute(select(counter).where(*_counted(user_id, kind, period)))).one_or_none()
    return Usage() if row is None else Usage(row.used, row.reserved)


async def _set_aside(connection: AsyncConnection, held: Reservation, total: int, limit: int) -> bool:
    """Add to what is reserved, or used, if it fits; one statement looks and adds."""
    more = {**_more((held.user_id, held.kind, held.period), *_places(held.state, total)), "limit": limit}
    if (await connection.execute(_COUNT_WITHIN, more)).rowcount == 1:
        return True
    zero = {"user_id": held.user_id, "kind": held.kind, "period": held.period, "used": 0, "reserved": 0}
    first = await insert_if_absent(connection, counter, zero)
    return first and (await connection.execute(_COUNT_WITHIN, more)).rowcount == 1


def _places(state: State, amount: int) -> tuple[int, int]:
    """Return what a reservation adds to what is used and to what is reserved."""
    return (amount, 0) if state is State.SETTLED else (0, amount)


async def _move(
    connection: AsyncConnection, moves: Sequence[tuple[str, State]], now: datetime
) -> dict[str, Reservation]:
    """Bring reservations to where they may go, each by itself and in order; return those that exist.

    Reservations are locked before counters, both in one order, so that two who do this wait and do not meet crosswise.
    """
    present = await _reservations(connection, [each for each, _ in moves])
    moved_ones: dict[str, Reservation] = {}
    changes: defaultdict[tuple[str, Kind, str], list[int]] = defaultdict(lambda: [0, 0])
    entries = []
    for reservation_id, target in moves:
        before = present.get(reservation_id)
        move = None if before is None else moved(before, target)
        if before is None or move is None:
            continue
        after = present[reservation_id] = moved_ones[reservation_id] = replace(before, state=move.state)
        if move.used or move.reserved:
            change = changes[after.user_id, after.kind, after.period]
            change[0] += move.used
            change[1] += move.reserved
            entries.append(_entry(after, move.used, move.reserved, now))
    if moved_ones:
        rows = [{"key": each, **_reservation_columns(of, now)} for each, of in moved_ones.items()]
        await connection.execute(_UPDATE_RESERVATION, rows)
    if changes:
        await connection.execute(_COUNT, [_more(key, *change) for key, change in sorted(changes.items())])
        await connection.execute(_INSERT_ENTRY, entries)
    return present


def _reach(step: str, targets: Iterable[State]) -> None:
    for target in targets:
        crash.point(f"quota {target}: {step}")


def _from_reservation_row(row: Row[Any]) -> Reservation:
    return Reservation(row.reservation_id, row.user_id, Kind(row.kind), row.period, row.amount, State(row.state))


def _reservation_columns(of: Reservation, now: datetime) -> dict[str, Any]:
    return {
        "reservation_id": of.reservation_id,
        "user_id": of.user_id,
        "kind": of.kind,
        "period": of.period,
        "amount": of.amount,
        "state": of.state,
        "update_time": now,
    }


def _entry(of: Reservation, used: int, reserved: int, now: datetime) -> dict[str, Any]:
    """Return the ledger's row for a change of a counter."""
    return {
        "user_id": of.user_id,
        "kind": of.kind,
        "period": of.period,
        "reservation_id": of.reservation_id,
        "used": used,
        "reserved": reserved,
        "create_time": now,
    }


def _among(reservation_ids: Iterable[str]) -> ColumnElement[bool]:
    return reservation.c.reservation_id.in_(reservation_ids)


def _more(key: tuple[str, Kind, str], used: int, reserved: int) -> dict[str, Any]:
    """Return the values of `_COUNT`."""
    own = dict(zip(("of_user", "of_kind", "of_period"), key, strict=True))
    return {**own, "more_used": used, "more_reserved": reserved}


def _counted(user_id: str, kind: Kind, period: str) -> tuple[Any, ...]:
    return counter.c.user_id == user_id, counter.c.kind == kind, counter.c.period == period


def _columns(account: Account) -> dict[str, Any]:
    return {
        "user_id": account.user_id,
        "username": account.username,
        "username_key": account.username.casefold(),
        "email": account.email,
        "email_key": account.email.casefold(),
        "display_name": account.display_name,
        "role": account.role,
        "status": account.status,
        "password_hash": account.password_hash,
        "limit_tasks": account.limits.get(Kind.TASKS),
        "limit_storage_bytes": account.limits.get(Kind.STORAGE_BYTES),
        "create_time": account.create_time,
        "version": account.version,
        "generation": account.generation,
    }


def _from_row(row: Row[Any]) -> Account:
    own = {Kind.TASKS: row.limit_tasks, Kind.STORAGE_BYTES: row.limit_storage_bytes}
    return Account(
        user_id=row.user_id,
        username=row.username,
        email=row.email,
        password_hash=row.password_hash,
        create_time=row.create_time,
        display_name=row.display_name,
        role=Role(row.role),
        status=Status(row.status),
        limits={kind: limit for kind, limit in own.items() if limit is not None},
        version=row.version,
        generation=row.generation,
    )


def _taken(error: IntegrityError) -> MeshError:
    """Return which unique column was refused: both SQLite and PostgreSQL name it in the driver's text."""
    if "email_key" in str(error.orig):
        return EmailTaken("Somebody has registered this address.", metadata={"field": "email"})
    return UsernameTaken("This name is taken.", metadata={"field": "username"})
