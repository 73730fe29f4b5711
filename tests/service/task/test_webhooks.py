"""The ends of tasks arrive at their owners' servers: signed, once in effect, and for as long as it takes."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from atelier.task.v1 import task_pb2 as pb
from atelier.task.v1 import webhook_pb2 as hook
from sqlalchemy import insert, select, update

from mesh.clock import SystemClock
from mesh.database import Database
from mesh.errors import Unavailable
from services.task import convert
from services.task.sender import AT_ONCE_PER_USER, Sender, posting
from services.task.tables import webhook, webhook_delivery
from services.task.webhook_repository import SqlWebhooks
from services.task.webhooks import PATIENCE, Claimed, Delivery, Network, Outcome, Patience, new_secret
from tests.databases import are_waiting, on_postgresql, on_sqlite
from tests.eventually import eventually
from tests.service.task.conftest import LOOPBACK, OWNER, STRANGER, Replica, Start, refused
from tests.service.task.test_batches import batch, resized
from tests.webhook_receiver import Receiver, receiving

BRISK = Patience(first=timedelta(milliseconds=20), longest=timedelta(milliseconds=50))
DELIVERED, PENDING, FAILED = (
    hook.WebhookDelivery.STATE_DELIVERED,
    hook.WebhookDelivery.STATE_PENDING,
    hook.WebhookDelivery.STATE_FAILED,
)


class Killed(SqlWebhooks):
    """Dies after a request was made: it never notes anything."""

    async def settle(self, *_: Any) -> None:
        await asyncio.Event().wait()

    async def release(self, _: Any) -> None:
        pass


class Interrupted(SqlWebhooks):
    """Has its database away when it is first asked for work, and when it first notes an outcome."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._away = {"claim", "settle"}

    async def claim(self, *arguments: Any) -> list[Claimed]:
        self._reach("claim")
        return await super().claim(*arguments)

    async def settle(self, *arguments: Any) -> Delivery | None:
        self._reach("settle")
        return await super().settle(*arguments)

    def _reach(self, step: str) -> None:
        if step in self._away:
            self._away.remove(step)
            raise Unavailable("The database is away.")


class Broken:
    """Meets a bug with the path /broken; all others take what they get."""

    async def post(self, url: str, _headers: Mapping[str, str], _body: bytes) -> Outcome:
        if url.endswith("/broken"):
            raise ValueError("a bug")
        return Outcome(status=204)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as started:
        yield started


@asynccontextmanager
async def sending(
    replica: Replica,
    patience: Patience = BRISK,
    owed: Callable[..., SqlWebhooks] = SqlWebhooks,
    allowed: Collection[Network] = (LOOPBACK,),
) -> AsyncIterator[None]:
    """Have a replica make what is owed, until the end of the block."""
    async with posting(allowed) as posts:
        work = asyncio.create_task(Sender(owed(replica.database), posts, SystemClock(), patience).run())
        try:
            yield
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


async def set_url(replica: Replica, url: str, user_id: str = OWNER) -> hook.Webhook:
    return await replica.webhooks(user_id).SetWebhook(hook.SetWebhookRequest(url=url))


async def cancelled(replica: Replica, webhook_url: str = "") -> pb.Task:
    """Return a task that has ended: the quickest end."""
    task = await replica.create(webhook_url=webhook_url)
    return await replica.user().CancelTask(pb.CancelTaskRequest(task_id=task.task_id))


async def deliveries(replica: Replica, user_id: str = OWNER, **fields: Any) -> list[hook.WebhookDelivery]:
    request = hook.ListWebhookDeliveriesRequest(**fields)
    return list((await replica.webhooks(user_id).ListWebhookDeliveries(request)).deliveries)


async def come_to(replica: Replica, state: hook.WebhookDelivery.State) -> hook.WebhookDelivery:
    """Return the newest delivery once it is in a state."""

    async def there() -> hook.WebhookDelivery | None:
        [newest, *_] = await deliveries(replica)
        return newest if newest.state == state else None

    return await eventually(there, within_seconds=15)


async def resend(replica: Replica, delivery_id: str, user_id: str = OWNER) -> hook.WebhookDelivery:
    request = hook.ResendWebhookDeliveryRequest(delivery_id=delivery_id)
    return await replica.webhooks(user_id).ResendWebhookDelivery(request)


async def test_the_end_of_a_task_arrives_signed_as_json_shows_it(replica: Replica, receiver: Receiver):
    webhook = await set_url(replica, receiver.url())
    await replica.create()
    await replica.complete(await replica.claimed())

    async with sending(replica):
        done = await come_to(replica, DELIVERED)

    [heard] = receiver.heard
    stored = await replica.tasks.find(done.task_id)
    assert heard.verified_by(webhook.secret)
    assert heard.event["type"] == "atelier.task.v1.TaskSucceeded"
    assert heard.event["timestamp"] == heard.event["data"]["endTime"]
    assert heard.body.decode().endswith(f',"data":{convert.task_to_json(stored)}}}')
    assert heard.id == done.event_id == f"{done.task_id}/{stored.sequence}"
    assert (done.attempts, done.status, done.failure, done.url) == (1, 204, "", receiver.url())
    assert not done.HasField("next_attempt_time")


async def test_each_kind_of_end_is_told_and_nothing_else(replica: Replica, receiver: Receiver):
    await set_url(replica, receiver.url())
    await replica.create()
    await replica.complete(await replica.claimed())
    await replica.create()
    await replica.fail(await replica.claimed())
    await cancelled(replica)

    found = await deliveries(replica)

    names = [each.event_type.rpartition(".")[2] for each in found]
    assert names == ["TaskCancelled", "TaskFailed", "TaskSucceeded"]
    assert {each.state for each in found} == {PENDING}


async def test_a_tasks_own_url_takes_the_place_of_the_accounts(replica: Replica, receiver: Receiver):
    await set_url(replica, receiver.url("/account"))
    own = await cancelled(replica, receiver.url("/own"))
    other = await cancelled(replica)

    async with sending(replica):
        await eventually(lambda: len(receiver.heard) == 2)

    assert [each.event["data"]["taskId"] for each in receiver.heard if each.path == "/own"] == [own.task_id]
    assert [each.event["data"]["taskId"] for each in receiver.heard if each.path == "/account"] == [other.task_id]


async def test_a_task_with_a_url_gives_its_owner_a_secret(replica: Replica, receiver: Receiver):
    before = await refused(replica.webhooks().GetWebhook(hook.GetWebhookRequest()))
    await cancelled(replica, receiver.url())
    webhook = await replica.webhooks().GetWebhook(hook.GetWebhookRequest())

    async with sending(replica):
        await come_to(replica, DELIVERED)

    assert (before.code, before.reason) == ("NOT_FOUND", "WEBHOOK_NOT_FOUND")
    assert webhook.url == ""
    assert receiver.heard[0].verified_by(webhook.secret)


async def test_every_task_of_a_batch_is_told(replica: Replica, receiver: Receiver):
    request = batch(resized(), resized())
    request.webhook_url = receiver.url()
    made = await replica.user().CreateTaskBatch(request)
    await replica.user().CancelTaskBatch(pb.CancelTaskBatchRequest(batch_id=made.batch_id))

    async with sending(replica):
        await eventually(lambda: len(receiver.heard) == 2)

    assert {each.event["data"]["batchId"] for each in receiver.heard} == {made.batch_id}


async def test_a_retried_task_tells_its_second_end_too(replica: Replica, receiver: Receiver):
    task = await cancelled(replica, receiver.url())
    await replica.user().RetryTask(pb.RetryTaskRequest(task_id=task.task_id))
    await replica.complete(await replica.claimed())

    async with sending(replica):
        await eventually(lambda: len(receiver.heard) == 2)

    types = {each.event["type"] for each in receiver.heard}
    assert types == {"atelier.task.v1.TaskCancelled", "atelier.task.v1.TaskSucceeded"}
    assert len(set(receiver.ids())) == 2


async def test_without_a_webhook_nothing_is_owed(replica: Replica):
    await cancelled(replica)

    assert await deliveries(replica) == []


async def test_what_is_refused_is_sent_again_with_the_same_id(replica: Replica, receiver: Receiver):
    receiver.statuses = [500, 503]
    await cancelled(replica, receiver.url())

    async with sending(replica):
        done = await come_to(replica, DELIVERED)

    assert receiver.ids() == [done.event_id] * 3
    assert len({each.body for each in receiver.heard}) == 1
    assert (done.attempts, done.status, done.failure) == (3, 204, "")


async def test_a_failure_is_listed_with_the_time_of_the_next_request(replica: Replica, receiver: Receiver):
    receiver.statuses = [500]
    await cancelled(replica, receiver.url())

    async with sending(replica, PATIENCE):
        waiting = await eventually(partial(one_failed, replica))

    assert (waiting.state, waiting.status, waiting.failure, waiting.attempts) == (PENDING, 500, "REFUSED", 1)
    assert waiting.next_attempt_time.ToDatetime() > waiting.attempt_time.ToDatetime()


async def one_failed(replica: Replica) -> hook.WebhookDelivery | None:
    [found] = await deliveries(replica)
    return found if found.failure else None


async def test_a_receiver_that_says_gone_is_not_asked_again(replica: Replica, receiver: Receiver):
    receiver.statuses = [410]
    await cancelled(replica, receiver.url())

    async with sending(replica):
        given_up = await come_to(replica, FAILED)

    assert (given_up.failure, given_up.status, given_up.attempts) == ("GONE", 410, 1)


async def test_a_redirect_is_a_failure_and_not_followed(replica: Replica, receiver: Receiver):
    receiver.statuses, receiver.location = [307], receiver.url("/elsewhere")
    await cancelled(replica, receiver.url())

    async with sending(replica, PATIENCE):
        waiting = await eventually(partial(one_failed, replica))

    assert (waiting.failure, waiting.status, receiver.ids("/elsewhere")) == ("REFUSED", 307, [])


async def test_after_a_day_it_is_given_up(replica: Replica, receiver: Receiver):
    receiver.statuses = [500] * 3
    await cancelled(replica, receiver.url())
    async with replica.database.transaction() as connection:
        await connection.execute(update(webhook_delivery).values(expire_time=webhook_delivery.c.create_time))

    async with sending(replica):
        given_up = await come_to(replica, FAILED)

    assert (given_up.failure, given_up.attempts) == ("REFUSED", 1)


async def test_two_replicas_send_each_end_once(start: Start, receiver: Receiver):
    first, second = await start(), await start()
    await set_url(first, receiver.url())
    made = await first.user().CreateTaskBatch(batch(*(resized() for _ in range(40))))
    await first.user().CancelTaskBatch(pb.CancelTaskBatchRequest(batch_id=made.batch_id))

    async with sending(first, PATIENCE), sending(second, PATIENCE):
        await eventually(partial(all_delivered, first), within_seconds=30)

    assert len(receiver.ids()) == len(set(receiver.ids())) == 40


async def all_delivered(replica: Replica) -> bool:
    return {each.state for each in await deliveries(replica, page_size=200)} == {DELIVERED}


async def test_a_replica_killed_between_the_request_and_its_note_leaves_it_to_another(start: Start, receiver: Receiver):
    first, second = await start(), await start()
    task = await cancelled(first, receiver.url())
    short = replace(PATIENCE, lease=timedelta(milliseconds=300))
    async with sending(first, short, Killed):
        await eventually(lambda: len(receiver.heard) == 1)

    async with sending(second, PATIENCE):
        done = await come_to(second, DELIVERED)

    assert receiver.ids() == [done.event_id] * 2
    assert (done.task_id, done.attempts) == (task.task_id, 2)


async def test_a_database_that_is_away_for_a_moment_costs_no_delivery(replica: Replica, receiver: Receiver):
    await cancelled(replica, receiver.url())

    async with sending(replica, replace(PATIENCE, lease=timedelta(milliseconds=300)), Interrupted):
        done = await come_to(replica, DELIVERED)

    assert receiver.ids() == [done.event_id] * 2


async def test_a_bug_with_one_delivery_stops_no_other(replica: Replica):
    broken, _ = [await cancelled(replica, f"http://127.0.0.1/{path}") for path in ("broken", "well")]

    async def both() -> bool:
        found = {each.task_id == broken.task_id: each for each in await deliveries(replica)}
        return (found[True].failure, found[False].state) == ("NO_ANSWER", DELIVERED)

    work = asyncio.create_task(Sender(SqlWebhooks(replica.database), Broken(), SystemClock()).run())
    try:
        await eventually(both, within_seconds=15)
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def test_a_replica_that_stops_leaves_what_it_had_in_hand_at_once(start: Start, receiver: Receiver):
    first, second = await start(), await start()
    receiver.answering.clear()
    await cancelled(first, receiver.url())
    async with sending(first, PATIENCE):
        await eventually(lambda: len(receiver.heard) == 1)
    receiver.answering.set()

    async with sending(second, PATIENCE):  # whose lease would be 40 s
        done = await come_to(second, DELIVERED)

    assert done.attempts == 2


async def test_one_users_slow_receiver_does_not_hold_up_another_user(replica: Replica, receiver: Receiver):
    receiver.answering.clear()
    await set_url(replica, receiver.url())
    made = await replica.user().CreateTaskBatch(batch(*(resized() for _ in range(50))))
    await replica.user().CancelTaskBatch(pb.CancelTaskBatchRequest(batch_id=made.batch_id))
    async with receiving() as quick, sending(replica, PATIENCE):
        await set_url(replica, quick.url(), STRANGER)
        await owe_a_copy(replica, STRANGER)

        await eventually(lambda: len(quick.heard) == 1)

        assert len(receiver.heard) <= AT_ONCE_PER_USER


async def owe_a_copy(replica: Replica, user_id: str) -> None:
    """Owe a user what is owed to somebody: strangers have no files to make tasks of."""
    async with replica.database.transaction() as connection:
        row = (await connection.execute(select(webhook_delivery).limit(1))).one()
        later = row.create_time + timedelta(seconds=1)
        copy = {**row._asdict(), "delivery_id": "whd_copy", "user_id": user_id, "url": None, "due_time": later}
        await connection.execute(insert(webhook_delivery).values({**copy, "state": "PENDING", "attempts": 0}))


async def test_deliveries_are_listed_newest_first_by_page_and_by_task(replica: Replica, receiver: Receiver):
    tasks = [await cancelled(replica, receiver.url()) for _ in range(3)]
    stub = replica.webhooks()

    first = await stub.ListWebhookDeliveries(hook.ListWebhookDeliveriesRequest(page_size=2))
    rest = await stub.ListWebhookDeliveries(
        hook.ListWebhookDeliveriesRequest(page_size=2, page_token=first.next_page_token)
    )
    own = await deliveries(replica, task_id=tasks[1].task_id)

    assert [each.task_id for each in [*first.deliveries, *rest.deliveries]] == [each.task_id for each in tasks[::-1]]
    assert rest.next_page_token == ""
    assert [each.task_id for each in own] == [tasks[1].task_id]


async def test_strangers_see_and_resend_nothing(replica: Replica, receiver: Receiver):
    await cancelled(replica, receiver.url())
    [delivery] = await deliveries(replica)

    refusal = await refused(resend(replica, delivery.delivery_id, STRANGER))

    assert await deliveries(replica, STRANGER) == []
    assert (refusal.code, refusal.reason) == ("NOT_FOUND", "WEBHOOK_DELIVERY_NOT_FOUND")
    assert refusal.metadata["delivery_id"] == delivery.delivery_id


async def test_a_delivery_is_sent_again_to_where_the_account_now_hears(replica: Replica, receiver: Receiver):
    receiver.statuses = [410]
    await set_url(replica, receiver.url("/mistaken"))
    await cancelled(replica)
    async with sending(replica):
        given_up = await come_to(replica, FAILED)
        await set_url(replica, receiver.url("/right"))

        again = await resend(replica, given_up.delivery_id)
        await come_to(replica, DELIVERED)

    assert (again.state, again.delivery_id) == (PENDING, given_up.delivery_id)
    assert receiver.ids("/mistaken") == receiver.ids("/right") == [given_up.event_id]


async def test_what_was_delivered_can_be_sent_again(replica: Replica, receiver: Receiver):
    await cancelled(replica, receiver.url())
    async with sending(replica):
        done = await come_to(replica, DELIVERED)

        await resend(replica, done.delivery_id)
        await eventually(lambda: len(receiver.heard) == 2)
        again = await come_to(replica, DELIVERED)

    assert receiver.ids() == [done.event_id] * 2
    assert again.attempts == 2


async def test_what_is_asked_for_again_while_it_is_being_sent_is_sent_again(replica: Replica, receiver: Receiver):
    receiver.answering.clear()
    await cancelled(replica, receiver.url())
    async with sending(replica, PATIENCE):
        await eventually(lambda: len(receiver.heard) == 1)

        [delivery] = await deliveries(replica)
        await resend(replica, delivery.delivery_id)
        receiver.answering.set()
        done = await come_to(replica, DELIVERED)

    assert (done.attempts, receiver.ids()) == (2, [done.event_id] * 2)


async def test_a_deleted_webhook_hears_nothing_more_and_keeps_its_secret(replica: Replica, receiver: Receiver):
    webhook = await set_url(replica, receiver.url())
    await cancelled(replica)

    for _ in range(2):
        await replica.webhooks().DeleteWebhook(hook.DeleteWebhookRequest())
    async with sending(replica):
        given_up = await come_to(replica, FAILED)
    await cancelled(replica)

    left = await replica.webhooks().GetWebhook(hook.GetWebhookRequest())
    assert (given_up.failure, receiver.heard, len(await deliveries(replica))) == ("WEBHOOK_DELETED", [], 1)
    assert (left.url, left.secret) == ("", webhook.secret)


async def test_both_secrets_sign_after_a_rotation(replica: Replica, receiver: Receiver):
    before = await set_url(replica, receiver.url())
    rotated = await replica.webhooks().RotateWebhookSecret(hook.RotateWebhookSecretRequest())
    await cancelled(replica)

    async with sending(replica):
        await come_to(replica, DELIVERED)

    assert rotated.secret != before.secret
    assert receiver.heard[0].verified_by(before.secret)
    assert receiver.heard[0].verified_by(rotated.secret)
    assert not receiver.heard[0].verified_by(new_secret(b"x" * 32))
    assert rotated.HasField("previous_secret_expire_time")


async def test_setting_a_url_again_keeps_the_secret(replica: Replica, receiver: Receiver):
    first = await set_url(replica, receiver.url("/a"))
    second = await set_url(replica, receiver.url("/b"))
    strangers = await set_url(replica, receiver.url("/c"), STRANGER)

    assert (second.secret, second.url) == (first.secret, receiver.url("/b"))
    assert strangers.secret != first.secret
    assert (await replica.webhooks().GetWebhook(hook.GetWebhookRequest())).url == receiver.url("/b")


@on_sqlite
async def test_a_hostile_url_is_refused_wherever_it_is_given(replica: Replica):
    hostile = "http://169.254.169.254/latest/meta-data/"
    many = batch(resized())
    many.webhook_url = hostile

    refusals = [
        await refused(set_url(replica, hostile)),
        await refused(replica.create(webhook_url=hostile)),
        await refused(replica.user().CreateTaskBatch(many)),
    ]

    assert {(each.code, each.reason) for each in refusals} == {("INVALID_ARGUMENT", "WEBHOOK_URL_REFUSED")}
    assert [each.metadata["field"] for each in refusals] == ["url", "webhookUrl", "webhookUrl"]
    assert not (await replica.user().ListTasks(pb.ListTasksRequest())).tasks


async def test_a_name_that_means_ourselves_is_never_connected_to(replica: Replica, receiver: Receiver):
    await cancelled(replica, receiver.url(host="localhost"))

    async with sending(replica, PATIENCE, allowed=()):
        waiting = await eventually(partial(one_failed, replica))

    assert (waiting.failure, waiting.status, receiver.heard) == ("NO_PUBLIC_ADDRESS", 0, [])


async def test_deliveries_are_kept_as_long_as_their_tasks(replica: Replica, receiver: Receiver):
    await cancelled(replica, receiver.url())

    await replica.tasks.cut(timedelta(0), 100, await replica.fence())

    assert await deliveries(replica) == []


@on_postgresql
async def test_of_two_changes_of_a_webhook_at_once_neither_is_lost(replica: Replica):
    webhooks = SqlWebhooks(replica.database)
    await webhooks.put(OWNER, "https://old.example", "whsec_b2xk")

    async with replica.database.transaction() as connection:
        await connection.execute(select(webhook).with_for_update())
        changes = [
            asyncio.create_task(webhooks.put(OWNER, "https://new.example", "whsec_bm9uZQ==")),
            asyncio.create_task(webhooks.rotate(OWNER, "whsec_bmV3")),
        ]
        await eventually(lambda: are_waiting(replica.database, 2))
    await asyncio.gather(*changes)

    found = await webhooks.find(OWNER)
    assert found is not None
    assert (found.url, found.secret, found.previous_secret) == ("https://new.example", "whsec_bmV3", "whsec_b2xk")
