"""Sessions, refresh tokens, revocations and signing keys in a SQL database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Row, delete, exists, func, insert, select, type_coerce, update
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh import lock
from mesh.database import Database, insert_if_absent
from services.auth.domain import (
    FORGET,
    RefreshToken,
    Revocation,
    Session,
    SigningKey,
    recently_refreshed,
    replayed,
    require_live,
    session_revocation,
    session_revoked,
)
from services.auth.tables import lock_table, refresh_token, signing_key
from services.auth.tables import revocation as revocation_table
from services.auth.tables import session as session_table

FORGOTTEN_AT_ONCE = 1000  # tokens in one transaction, so that nobody who writes waits long for it
ENDED_AT_ONCE = 1000  # sessions in one statement: PostgreSQL takes 65,535 values

# Made once, as all that is asked four times a second: making a statement costs as much as sending it.
_EXPIRY = type_coerce(revocation_table.c.expire_time, BigInteger)
# The sum as well: one that is not the last to expire may come as another goes. A sum of remainders, since SQLite's have
# 63 bits; those that trade places expire less than 2^31 microseconds apart.
_VERSION = select(func.count(), func.max(_EXPIRY), func.sum(_EXPIRY % 2**31))
_KEYS = select(signing_key).order_by(signing_key.c.number)


class SqlSessions:
    """Satisfies `domain.Sessions`. One transaction per method."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def open(self, session: Session, token: RefreshToken) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(insert(session_table).values(asdict(session)))
            await connection.execute(insert(refresh_token).values(asdict(token)))

    async def find(self, token_hash: bytes) -> Session | None:
        found = (
            select(session_table)
            .join(refresh_token, refresh_token.c.session_id == session_table.c.session_id)
            .where(refresh_token.c.token_hash == token_hash)
        )
        async with self._database.query() as connection:
            row = (await connection.execute(found)).one_or_none()
        return None if row is None else Session(**row._mapping)  # noqa: SLF001 - public in spite of its name

    async def exchange(self, token_hash: bytes, successor: RefreshToken, now: datetime) -> None:
        async with self._database.transaction() as connection:
            token = require_live(await _token(connection, token_hash), now)
            session_id = token.session_id
            # Locked: whoever ends the session meanwhile comes before or after this exchange, and then knows of it.
            session = select(session_table.c.revoke_time).where(session_table.c.session_id == session_id)
            revoke_time = await connection.scalar(session.with_for_update())
            revoked = revoke_time is not None
            if not revoked and replayed(token, now):
                await _revoke(connection, session_table.c.session_id == session_id, now)
                revoked = True
            if not revoked:
                await connection.execute(
                    update(refresh_token)
                    .where(refresh_token.c.token_hash == token_hash, refresh_token.c.use_time.is_(None))
                    .values(use_time=now)
                )
                await connection.execute(insert(refresh_token).values(asdict(successor)))
        if revoked:  # told only after the commit that it must not undo
            raise session_revoked(session_id)

    async def revoke(self, session: Session, now: datetime, *, all_sessions: bool) -> None:
        one, every = session_table.c.session_id == session.session_id, session_table.c.user_id == session.user_id
        async with self._database.transaction() as connection:
            await _revoke(connection, every if all_sessions else one, now)

    async def forget(self, now: datetime, fence: int) -> None:
        old = select(refresh_token.c.token_hash, refresh_token.c.session_id).where(refresh_token.c.expire_time <= now)
        kept = exists().where(refresh_token.c.session_id == session_table.c.session_id)
        more = True
        while more:
            async with self._database.transaction() as connection:
                await lock.require(connection, lock_table, FORGET, fence)
                rows = (await connection.execute(old.limit(FORGOTTEN_AT_ONCE))).all()
                hashes, session_ids = [row.token_hash for row in rows], {row.session_id for row in rows}
                await connection.execute(delete(refresh_token).where(refresh_token.c.token_hash.in_(hashes)))
                # A session is over with its last token: no need to look through all sessions.
                over = session_table.c.session_id.in_(session_ids) & ~kept
                await connection.execute(delete(session_table).where(over))
            more = len(rows) == FORGOTTEN_AT_ONCE


class SqlRevocations:
    """Satisfies `domain.Revocations`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, revocation: Revocation, now: datetime) -> None:
        async with self._database.transaction() as connection:
            await _refuse(connection, [revocation], now)

    async def version(self) -> object:
        async with self._database.query() as connection:
            return tuple((await connection.execute(_VERSION)).one())

    async def all(self) -> list[Revocation]:
        async with self._database.query() as connection:
            rows = await connection.execute(select(revocation_table))
            return [Revocation(*row) for row in rows]


class SqlKeys:
    """Satisfies `domain.Keys`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> list[SigningKey]:
        async with self._database.query() as connection:
            rows = await connection.execute(_KEYS)
            return [SigningKey(**row._mapping) for row in rows]  # noqa: SLF001 - public in spite of its name

    async def add(self, key: SigningKey) -> bool:
        async with self._database.transaction() as connection:
            return await insert_if_absent(connection, signing_key, asdict(key))

    async def replace(self, key: SigningKey) -> None:
        async with self._database.transaction() as connection:
            if await insert_if_absent(connection, signing_key, asdict(key)):
                await connection.execute(delete(signing_key).where(signing_key.c.number != key.number))
                await connection.execute(delete(revocation_table))

    async def drop(self, key_ids: Sequence[str]) -> None:
        async with self._database.transaction() as connection:
            await connection.execute(delete(signing_key).where(signing_key.c.key_id.in_(key_ids)))


async def _token(connection: AsyncConnection, token_hash: bytes) -> RefreshToken | None:
    found = select(refresh_token).where(refresh_token.c.token_hash == token_hash).with_for_update()
    row: Row[Any] | None = (await connection.execute(found)).one_or_none()
    return None if row is None else RefreshToken(**row._mapping)  # noqa: SLF001 - public in spite of its name


async def _revoke(connection: AsyncConnection, which: Any, now: datetime) -> None:
    """End sessions, and revoke the access tokens of those that may have valid ones."""
    ending = select(session_table.c.session_id).where(which, session_table.c.revoke_time.is_(None))
    # Locked before their tokens are looked at; in one order, so that two who end several do not wait for each other.
    found = (await connection.scalars(ending.order_by(session_table.c.session_id).with_for_update())).all()
    recent = exists().where(
        refresh_token.c.session_id == session_table.c.session_id,
        refresh_token.c.expire_time > recently_refreshed(now),
    )
    for start in range(0, len(found), ENDED_AT_ONCE):
        ended = session_table.c.session_id.in_(found[start : start + ENDED_AT_ONCE])
        in_use = await connection.scalars(select(session_table.c.session_id).where(ended, recent))
        await _refuse(connection, [session_revocation(session_id, now) for session_id in in_use], now)
        await connection.execute(update(session_table).where(ended).values(revoke_time=now))


async def _refuse(connection: AsyncConnection, revocations: Sequence[Revocation], now: datetime) -> None:
    await connection.execute(delete(revocation_table).where(revocation_table.c.expire_time <= now))
    for revocation in revocations:
        await insert_if_absent(connection, revocation_table, asdict(revocation))
