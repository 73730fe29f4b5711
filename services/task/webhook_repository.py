"""Webhooks and their deliveries in a SQL database."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import ColumnElement, Row, bindparam, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh.database import Database, insert_if_absent, now
from services.task.tables import PENDING
from services.task.tables import webhook as webhook_table
from services.task.tables import webhook_delivery as delivery_table
from services.task.webhooks import (
    Claimed,
    Delivery,
    DeliveryPage,
    DeliveryQuery,
    DeliveryState,
    Outcome,
    Patience,
    Webhook,
    WebhookDeliveryNotFound,
    require_webhook,
    resent,
    settled,
)
from services.task.webhooks import Failure as DeliveryFailure

DUE_AT_ONCE = 1000  # deliveries among which a claim looks for those of different users


class SqlWebhooks:
    """Satisfies `webhooks.Webhooks`. One transaction per method."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, user_id: str) -> Webhook | None:
        async with self._database.query() as connection:
            return (await _webhooks(connection, [user_id])).get(user_id)

    async def ensure(self, user_id: str, new_secret: str) -> None:
        async with self._database.transaction() as connection:
            await _webhook(connection, user_id, new_secret)

    async def put(self, user_id: str, url: str, new_secret: str) -> Webhook:
        async with self._database.transaction() as connection:
            webhook = await _webhook(connection, user_id, new_secret)
            if webhook.url != url:
                webhook = replace(webhook, url=url, update_time=await now(connection))
                await _write(connection, webhook)
        return webhook

    async def clear(self, user_id: str) -> None:
        async with self._database.transaction() as connection:
            webhook = (await _webhooks(connection, [user_id], lock=True)).get(user_id)
            if webhook is not None and webhook.url is not None:
                await _write(connection, replace(webhook, url=None, update_time=await now(connection)))

    async def rotate(self, user_id: str, new_secret: str) -> Webhook:
        async with self._database.transaction() as connection:
            webhook = require_webhook((await _webhooks(connection, [user_id], lock=True)).get(user_id))
            time = await now(connection)
            webhook = replace(
                webhook, secret=new_secret, previous_secret=webhook.secret, rotate_time=time, update_time=time
            )
            await _write(connection, webhook)
        return webhook

    async def page(self, query: DeliveryQuery) -> DeliveryPage:
        found = (
            select(delivery_table)
            .where(delivery_table.c.user_id == query.user_id)
            .order_by(delivery_table.c.delivery_id.desc())
            .limit(query.size + 1)
        )
        if query.task_id is not None:
            found = found.where(delivery_table.c.task_id == query.task_id)
        if query.after is not None:
            found = found.where(delivery_table.c.delivery_id < query.after)
        async with self._database.reading() as connection:
            deliveries = [_delivery(row) for row in await connection.execute(found)]
            webhook = (await _webhooks(connection, [query.user_id])).get(query.user_id)
        return DeliveryPage(deliveries[: query.size], webhook, len(deliveries) > query.size)

    async def resend(self, delivery_id: str, owner: str, patience: Patience) -> tuple[Delivery, Webhook | None]:
        mine = (delivery_table.c.delivery_id == delivery_id) & (delivery_table.c.user_id == owner)
        async with self._database.transaction() as connection:
            row = (await connection.execute(select(delivery_table).where(mine).with_for_update())).one_or_none()
            if row is None:
                raise WebhookDeliveryNotFound(
                    f"There is no delivery {delivery_id}.", metadata={"delivery_id": delivery_id}
                )
            delivery = resent(_delivery(row), await now(connection), patience=patience)
            await connection.execute(update(delivery_table).where(mine).values(asdict(delivery)))
            webhook = (await _webhooks(connection, [owner])).get(owner)
        return delivery, webhook

    async def claim(self, count: int, per_user: int, busy: Collection[str], patience: Patience) -> list[Claimed]:
        async with self._database.transaction() as connection:
            time = await now(connection)
            due = (PENDING, delivery_table.c.due_time <= time)
            seen = (
                select(delivery_table.c.delivery_id, delivery_table.c.user_id, delivery_table.c.due_time)
                .where(*due, delivery_table.c.user_id.not_in(busy))
                .order_by(delivery_table.c.due_time)
                .limit(DUE_AT_ONCE)
                .subquery()
            )
            place = func.row_number().over(partition_by=seen.c.user_id, order_by=seen.c.due_time)
            placed = select(seen.c.delivery_id, place.label("place")).subquery()
            found = (
                select(delivery_table)
                .where(
                    *due,
                    delivery_table.c.delivery_id.in_(select(placed.c.delivery_id).where(placed.c.place <= per_user)),
                )
                .order_by(delivery_table.c.due_time)
                .limit(count)
                .with_for_update(skip_locked=True)  # and what another has claimed meanwhile is not due any more
            )
            claimed = [
                replace(
                    each,
                    attempts=each.attempts + 1,
                    tries=each.tries + 1,
                    attempt_time=time,
                    due_time=time + patience.lease,
                )
                for each in map(_delivery, await connection.execute(found))
            ]
            if not claimed:
                return []
            await connection.execute(
                update(delivery_table).where(delivery_table.c.delivery_id == bindparam("key")),
                [{**asdict(each), "key": each.delivery_id} for each in claimed],
            )
            webhooks = await _webhooks(connection, {each.user_id for each in claimed})
        return [
            Claimed(each, each.url or webhooks[each.user_id].url, webhooks[each.user_id].secrets(time))
            for each in claimed
        ]

    async def settle(self, delivery: Delivery, outcome: Outcome, patience: Patience, jitter: float) -> Delivery | None:
        async with self._database.transaction() as connection:
            after = settled(delivery, outcome, await now(connection), patience=patience, jitter=jitter)
            done = await connection.execute(update(delivery_table).where(_held(delivery)).values(asdict(after)))
        return after if done.rowcount else None

    async def release(self, delivery: Delivery) -> None:
        async with self._database.transaction() as connection:
            free = update(delivery_table).where(_held(delivery)).values(due_time=await now(connection))
            await connection.execute(free)


def _held(delivery: Delivery) -> ColumnElement[bool]:
    """Tell a claim that is still this one's: the next claim and a resend both move `due_time`."""
    return (delivery_table.c.delivery_id == delivery.delivery_id) & (delivery_table.c.due_time == delivery.due_time)


async def _webhook(connection: AsyncConnection, user_id: str, new_secret: str) -> Webhook:
    """Return a user's webhook, locked; one with a new secret if there was none."""
    time = await now(connection)
    row = {"user_id": user_id, "secret": new_secret, "create_time": time, "update_time": time}
    await insert_if_absent(connection, webhook_table, row)
    return (await _webhooks(connection, [user_id], lock=True))[user_id]


async def _webhooks(
    connection: AsyncConnection, user_ids: Collection[str], *, lock: bool = False
) -> Mapping[str, Webhook]:
    found = select(webhook_table).where(webhook_table.c.user_id.in_(user_ids))
    rows = await connection.execute(found.with_for_update() if lock else found)
    return {row.user_id: Webhook(**row._asdict()) for row in rows}


async def _write(connection: AsyncConnection, webhook: Webhook) -> None:
    mine = webhook_table.c.user_id == webhook.user_id
    await connection.execute(update(webhook_table).where(mine).values(asdict(webhook)))


def _delivery(row: Row[Any]) -> Delivery:
    columns = row._asdict()
    failure = None if row.failure is None else DeliveryFailure(row.failure)
    return Delivery(**{**columns, "state": DeliveryState(row.state), "failure": failure})
