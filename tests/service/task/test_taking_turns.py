"""Whose task a permit is for: each user's in turn, by weight, however many one of them has queued."""

import asyncio
from collections import Counter
from datetime import datetime, timedelta
from functools import partial

from atelier.task.v1 import task_pb2 as pb
from atelier.task.v1.task_pb2_grpc import TaskServiceStub
from sqlalchemy import select

from mesh import ids
from services.task import domain
from services.task.domain import Change, Task, Terms
from services.task.tables import task as task_table
from tests.databases import on_postgresql
from tests.service.task.conftest import OWNER, PHOTO, Replica, Start, resize

HOUR = Terms(lease=timedelta(hours=1))
WORKERS = 2


async def queue(replica: Replica, user: str, count: int, role: str = "ROLE_USER") -> None:
    """Queue tasks of a user, a thousand at a time."""
    for start in range(0, count, 1000):
        batch_id = ids.new("bat")

        def created(now: datetime, batch_id: str = batch_id, size: int = min(1000, count - start)) -> list[Change]:
            return [
                domain.created(
                    now,
                    task_id=ids.numbered("tsk", batch_id, number),
                    user_id=user,
                    role=role,
                    input_file_id=PHOTO,
                    file_ids=[PHOTO],
                    operation=b"",
                    batch_id=batch_id,
                )
                for number in range(size)
            ]

        await replica.tasks.add_batch(batch_id, created)


async def claims(replica: Replica, count: int) -> list[Task]:
    """Claim one after the other."""
    return [
        task
        for _ in range(count)
        for task in (await replica.tasks.claim("cpu", 1, partial(domain.claimed, terms=HOUR))).tasks
    ]


async def rounds(replica: Replica, user: str, count: int, at_most: float = 200) -> int:
    """Let two workers do jobs of equal length; return after how many of these lengths `count` of a user's are done."""
    passed = 0
    while count > 0:
        assert passed < at_most
        at_work = await claims(replica, WORKERS)
        assert at_work
        passed += 1
        for task in at_work:
            done = partial(domain.completed, attempt=task.attempt, output_file_ids=["fil_result"])
            await replica.tasks.change(task.task_id, done)
            count -= task.user_id == user
    return passed


async def test_ten_thousand_of_one_user_do_not_stand_before_a_hundred_of_another(replica: Replica):
    await queue(replica, "usr_b", 100)
    alone = await rounds(replica, "usr_b", 100)
    await queue(replica, "usr_a", 10_000)
    await claims(replica, WORKERS)

    await queue(replica, "usr_b", 100)

    assert alone == 50
    assert await rounds(replica, "usr_b", 100, at_most=2.2 * alone + 1) <= 2.2 * alone + 1


async def test_a_vip_has_four_turns_for_one(replica: Replica):
    await queue(replica, "usr_a", 100)
    await queue(replica, "usr_v", 100, "ROLE_VIP")

    served = Counter(task.user_id for task in await claims(replica, 50))

    assert served == {"usr_a": 10, "usr_v": 40}


async def test_one_who_queues_as_soon_as_a_task_is_claimed_gets_no_more_than_a_share(replica: Replica):
    await queue(replica, "usr_v", 100, "ROLE_VIP")
    await queue(replica, "usr_a", 1)
    served: Counter[str] = Counter()

    for _ in range(50):
        [task] = await claims(replica, 1)
        served[task.user_id] += 1
        if task.user_id == "usr_a":
            await queue(replica, "usr_a", 1)

    assert served == {"usr_v": 40, "usr_a": 10}


async def test_a_task_that_comes_back_from_a_worker_keeps_its_place(replica: Replica):
    await queue(replica, "usr_a", 3)
    [first, _] = await claims(replica, 2)
    back = partial(domain.returned, attempt=first.attempt, failure=domain.WORKER_LOST)

    await replica.tasks.change(first.task_id, back)

    [again] = await claims(replica, 1)
    assert (again.task_id, again.turn) == (first.task_id, first.turn)


async def test_one_who_comes_while_an_early_task_rests_is_not_let_before_all_others(replica: Replica):
    await queue(replica, "usr_a", 100)
    early, *_ = await claims(replica, 50)
    rest = Terms(lease=HOUR.lease, backoff=timedelta(hours=1))
    failed = partial(domain.failed, failure=domain.WORKER_LOST, transient=True, terms=rest, jitter=0.5)

    await replica.tasks.change(early.task_id, partial(failed, attempt=early.attempt))
    await queue(replica, "usr_b", 20)

    assert Counter(task.user_id for task in await claims(replica, 20)) == {"usr_a": 10, "usr_b": 10}


async def test_what_was_cancelled_takes_no_turns(replica: Replica):
    await queue(replica, "usr_b", 20)
    await queue(replica, "usr_a", 1000)
    unwanted = await replica.tasks.page(domain.Query("usr_a", None, None, None, 1))
    batch_id = unwanted.tasks[0].batch_id
    assert batch_id is not None
    await replica.tasks.change_batch(batch_id, domain.stopped, owner="usr_a")

    await queue(replica, "usr_a", 5)

    assert Counter(task.user_id for task in await claims(replica, 10)) == {"usr_a": 5, "usr_b": 5}


async def test_a_retry_waits_for_a_turn_like_a_new_task(replica: Replica):
    first = await replica.create()
    await replica.user().CancelTask(pb.CancelTaskRequest(task_id=first.task_id))
    await queue(replica, "usr_b", 2)
    second = await replica.create()

    await replica.user().RetryTask(pb.RetryTaskRequest(task_id=first.task_id))

    served = await claims(replica, 4)
    assert Counter(task.user_id for task in served[:2]) == {"usr_b": 1, OWNER: 1}
    assert [task.task_id for task in served if task.user_id == OWNER] == [second.task_id, first.task_id]


async def test_calls_at_once_of_one_user_take_turns_one_after_the_other(start: Start):
    replicas = [await start(), await start()]

    await asyncio.gather(*(replicas[n % 2].create() for n in range(20)))

    served = [task.turn for task in await claims(replicas[0], 20)]
    assert served == [domain.LONGEST_TURN * number for number in range(20)]


@on_postgresql
async def test_a_claim_that_is_under_way_holds_up_no_other(replica: Replica):
    first, second = await replica.create(), await replica.create()

    async with replica.database.transaction() as connection:
        await connection.execute(select(task_table).where(task_table.c.task_id == first.task_id).with_for_update())
        [claimed] = await claims(replica, 1)

    assert claimed.task_id == second.task_id


async def test_the_weight_is_that_of_the_role_in_the_access_token(replica: Replica):
    vip = TaskServiceStub(replica.server.channel(user=OWNER, role="ROLE_VIP"))

    created = [await vip.CreateTask(resize()) for _ in range(2)]

    served = await claims(replica, 2)
    assert [task.task_id for task in served] == [task.task_id for task in created]
    assert [(task.role, task.turn) for task in served] == [("ROLE_VIP", 0), ("ROLE_VIP", 1)]
