"""Equal work is done once, whoever asks for it, and nobody learns of whom the results are."""

import asyncio
import json
from itertools import count

import pytest
from atelier.storage.v1 import storage_pb2
from google.protobuf import json_format
from sqlalchemy import delete, func, select, text

from mesh.database import advisory_lock
from mesh.errors import NotFound, PermissionDenied, ResourceExhausted
from services.storage.domain import Origin, Turn, Work, work_key
from services.storage.keeping import Keeping
from services.storage.tables import file, making
from tests.databases import on_postgresql
from tests.service.storage.test_crashes import Crash, Crashing, crashing, in_agreement, tidied
from tests.service.storage.world import World, granted

OPERATION = '{"operation":"resize","quality":80,"version":1,"width":64}'


class Attempt:
    """An attempt at a task of somebody's, on an input of theirs."""

    def __init__(self, world: World, file_id: str, task_id: str, user_id: str, **changed: str) -> None:
        self.world = world
        self.capability = {"task_id": task_id, "user_id": user_id, "inputs": (file_id,)}
        self.work = storage_pb2.Work(
            input_file_ids=[file_id], **{"operation": OPERATION, "encoder": "libvips 1", **changed}
        )

    async def take(self, **claims) -> storage_pb2.TakeResultsResponse:
        stub = self.world.stub(None, caller="media-worker")
        return await stub.TakeResults(
            storage_pb2.TakeResultsRequest(capability=granted(**self.capability, **claims), work=self.work)
        )

    async def turn(self) -> str:
        answer = await self.take()
        return "take" if answer.files else "wait" if answer.wait else "make"

    async def write(self, body: bytes = b"small", index: int = 0, of: int = 1) -> str:
        made_of = {"work": json_format.MessageToJson(self.work, indent=None), "count": str(of)}
        async with self.world.worker(**self.capability) as http:
            answer = await http.post(
                "/internal/v1/results",
                params={"name": "x-64x64.txt", "index": str(index), "name_ending": "-64x64.txt", **made_of},
                content=body,
            )
        assert answer.status_code == 200, answer.text
        return answer.json()["fileId"]

    async def discard(self) -> None:
        stub = self.world.stub(None, caller="media-worker")
        await stub.DiscardResult(storage_pb2.DiscardResultRequest(capability=granted(**self.capability)))


async def asked(world: World, task_id: str, user: str = "usr_ann", body: bytes = b"photo", **changed: str) -> Attempt:
    """Return an attempt on a new upload."""
    answer = await world.upload(body, f"{user}.txt", user)
    return Attempt(world, answer.json()["fileId"], task_id, user, **changed)


async def lapse(world: World) -> None:
    async with world.sql.transaction() as connection:
        await connection.execute(text("UPDATE making SET until = until - 20000000"))


async def claims(world: World) -> int:
    async with world.sql.reading() as connection:
        return (await connection.execute(select(func.count()).select_from(making))).scalar_one()


async def test_another_s_equal_work_is_taken_charged_and_not_told_of(world):
    hers, his = await asked(world, "tsk_1"), await asked(world, "tsk_2", "usr_bob")
    turns = [await hers.turn(), await his.turn()]
    made = await hers.write()

    (taken,) = (await his.take()).files

    assert turns == ["make", "wait"]
    assert (taken.name, taken.task_id, taken.file_id != made) == ("usr_bob-64x64.txt", "tsk_2", True)
    assert taken.provenance.input_file_id == his.work.input_file_ids[0]
    assert world.users.used[taken.file_id] == world.users.used[made] == len(b"small")
    assert (await claims(world), await in_agreement(world)) == (0, True)
    told = str(await world.stub("usr_bob").GetFile(storage_pb2.GetFileRequest(file_id=taken.file_id)))
    assert not [secret for secret in ("usr_ann", "tsk_1", hers.work.input_file_ids[0], made) if secret in told]


async def test_taken_again_it_is_the_same_file_and_charged_once(world):
    hers, his = await asked(world, "tsk_1"), await asked(world, "tsk_2", "usr_bob")
    await hers.take()
    await hers.write()

    answers = await asyncio.gather(*(his.take() for _ in range(5)))

    assert len({answer.files[0].file_id for answer in answers}) == 1
    assert await in_agreement(world)


async def test_a_result_tells_its_owner_what_it_was_made_of(world):
    hers = await asked(world, "tsk_1", model="u2netp 1")
    file_id = await hers.write()

    found = await world.stub().GetFile(storage_pb2.GetFileRequest(file_id=file_id))

    source = await world.files.get("usr_ann", hers.work.input_file_ids[0])
    assert found.provenance == storage_pb2.File.Provenance(
        input_file_id=source.file_id, input_sha256=source.sha256, operation="resize",
        parameters='{"quality":80,"width":64}', operation_version=1, encoder="libvips 1", model="u2netp 1",
    )  # fmt: skip
    upload = await world.stub().GetFile(storage_pb2.GetFileRequest(file_id=source.file_id))
    assert not upload.HasField("provenance")


@pytest.mark.parametrize(
    "changed",
    [
        {"operation": OPERATION.replace('"version":1', '"version":2')},
        {"encoder": "libvips 2"},
        {"model": "u2netp 1"},
        {"body": b"another photo"},
    ],
)
async def test_work_that_differs_in_anything_is_other_work(world, changed):
    first, other = await asked(world, "tsk_1"), await asked(world, "tsk_2", **changed)
    await first.take()
    await first.write()

    assert await other.turn() == "make"


async def test_of_several_results_all_are_taken_or_none(world):
    first, second = await asked(world, "tsk_1"), await asked(world, "tsk_2")
    await first.take()
    await first.write(b"large", 0, of=2)
    half = await second.turn()
    small = await first.write(b"small", 1, of=2)

    taken = (await second.take()).files
    await world.stub().DeleteFile(storage_pb2.DeleteFileRequest(file_id=small))
    await world.stub().DeleteFile(storage_pb2.DeleteFileRequest(file_id=taken[0].file_id))

    assert (half, [each.size_bytes for each in taken]) == ("wait", [5, 5])
    assert taken[0].sha256 != taken[1].sha256
    assert await (await asked(world, "tsk_3")).turn() == "make"


async def test_of_many_who_ask_at_once_one_makes_it(world):
    asking = [await asked(world, f"tsk_{number}") for number in range(8)]

    turns = await asyncio.gather(*(each.turn() for each in asking))

    assert sorted(turns) == ["make", *["wait"] * 7]


async def test_a_maker_that_is_heard_of_no_more_is_replaced_and_one_that_is_stays(world):
    first, second, third = [await asked(world, f"tsk_{number}") for number in range(3)]
    lease = (await first.take()).lease_duration.ToTimedelta().total_seconds()
    await lapse(world)
    await first.take()
    held = await second.turn()
    await lapse(world)

    turns = [await second.turn(), await third.turn()]

    assert (lease, held, turns) == (15, "wait", ["make", "wait"])


async def test_a_maker_that_gives_up_lets_the_next_one_begin_at_once(world):
    first, second = await asked(world, "tsk_1"), await asked(world, "tsk_2")
    await first.take()

    await first.discard()

    assert await second.turn() == "make"


async def test_a_maker_that_was_replaced_gives_up_what_its_next_attempt_makes_to_nobody(world):
    first, other = await asked(world, "tsk_1"), await asked(world, "tsk_2")
    await first.take(attempt=1)
    await lapse(world)
    await first.take(attempt=2)

    await first.discard()  # of the first attempt

    assert await other.turn() == "wait"


async def test_claims_of_makers_that_died_are_swept_away(world):
    await (await asked(world, "tsk_1")).take()
    await lapse(world)

    await world.upkeep.sweep(await world.elected())

    assert await claims(world) == 0


async def test_what_was_deleted_is_made_anew_and_what_another_took_is_not(world):
    first, second, third = [await asked(world, f"tsk_{number}") for number in range(3)]
    await first.take()
    made = await first.write()
    (taken,) = (await second.take()).files

    await world.stub().DeleteFile(storage_pb2.DeleteFileRequest(file_id=made))
    (again,) = (await third.take()).files
    for each in (taken, again):
        await world.stub().DeleteFile(storage_pb2.DeleteFileRequest(file_id=each.file_id))

    assert await (await asked(world, "tsk_4")).turn() == "make"
    assert await in_agreement(world)


async def test_a_quota_that_is_full_or_a_limit_refuses_what_is_taken_as_what_is_made(world):
    first, second = await asked(world, "tsk_1"), await asked(world, "tsk_2")
    await first.take()
    await first.write()

    with pytest.raises(Exception, match="too large") as too_large:
        await second.take(max_bytes=4)
    world.users.limit = 0
    with pytest.raises(ResourceExhausted) as full:
        await second.take()

    assert (too_large.value.reason, full.value.reason) == ("FILE_TOO_LARGE", "QUOTA_EXCEEDED")
    assert len(await world.rows()) == 3
    assert await in_agreement(world)


async def test_of_several_results_that_the_quota_refuses_none_is_charged(world):
    first, second = await asked(world, "tsk_1"), await asked(world, "tsk_2")
    await first.write(b"large", 0, of=2)
    await first.write(b"small", 1, of=2)
    before = await world.rows()
    world.users.limit = sum(world.users.used.values()) + 5  # room for one of them

    with pytest.raises(ResourceExhausted):
        await second.take()

    assert {name for name in await world.rows() if name.startswith("not ready")} == set()
    assert set(await world.rows()) >= set(before)
    assert await in_agreement(world)


async def test_only_files_that_the_capability_names_and_the_owner_has_count(world):
    hers, his = await asked(world, "tsk_1"), await asked(world, "tsk_2", "usr_bob")
    unnamed, another = Attempt(world, "fil_x", "tsk_3", "usr_ann"), Attempt(world, "fil_x", "tsk_4", "usr_ann")
    unnamed.work.input_file_ids[:] = hers.work.input_file_ids
    another.work.input_file_ids[:] = his.work.input_file_ids
    another.capability["inputs"] = tuple(his.work.input_file_ids)

    with pytest.raises(PermissionDenied) as first:
        await unnamed.take()
    with pytest.raises(NotFound) as second:
        await another.take()

    assert (first.value.reason, second.value.reason) == ("CAPABILITY_INVALID", "FILE_NOT_FOUND")


async def test_a_second_input_counts_only_when_the_capability_names_it_too(world):
    hers, other = await asked(world, "tsk_1"), await asked(world, "tsk_2", body=b"mark")
    hers.work.input_file_ids.extend(other.work.input_file_ids)

    with pytest.raises(PermissionDenied) as refusal:
        await hers.take()

    assert refusal.value.reason == "CAPABILITY_INVALID"
    assert refusal.value.metadata == {"file_id": other.work.input_file_ids[0]}


def work(world: World, sha256: str) -> Work:
    origin = Origin("fil_1", sha256, OPERATION, "libvips 1", "")
    return Work(work_key(origin, [sha256]), "tsk_9", 1, "usr_ann", "a.txt", origin)


async def made(world: World) -> Work:
    """Have a result of some work, and return the same work as another task's."""
    first = await asked(world, "tsk_1")
    await first.write()
    source = await world.files.get("usr_ann", first.work.input_file_ids[0])
    return work(world, source.sha256)


# Three calls, each with a before and an after: take, charge, finish.
@pytest.mark.parametrize("at", range(6))
async def test_taking_that_crashes_anywhere_is_tidied_up_or_finished_by_its_repetition(world, at):
    same = await made(world)
    with pytest.raises(Crash):
        await crashing(world, at).take(same, 100)

    turn, files = await world.keeping.take(same, 100)
    repeated = await in_agreement(world)
    other = Work(**{name: getattr(same, name) for name in Work.__slots__} | {"task_id": "tsk_10"})
    with pytest.raises(Crash):
        await crashing(world, at).take(other, 100)
    await tidied(world)

    assert (turn, len(files), repeated) == (Turn.TAKE, 1, True)
    assert await in_agreement(world)


async def test_the_last_step_of_taking_is_known(world):
    same = await made(world)

    turn, (taken,) = await crashing(world, 8).take(same, 100)

    assert (turn, taken.ready) == (Turn.TAKE, True)


async def test_bytes_are_never_given_away_that_a_delete_takes_meanwhile(world):
    """A file goes while others take its content: each has it whole, or makes it."""
    for number in range(6):
        first = await asked(world, f"tsk_{number}_0", body=f"photo {number}".encode())
        file_id = await first.write(f"small {number}".encode())
        others = [Attempt(world, first.work.input_file_ids[0], f"tsk_{number}_{n}", "usr_ann") for n in (1, 2, 3)]

        async def delete_it(file_id: str = file_id) -> None:
            await world.stub().DeleteFile(storage_pb2.DeleteFileRequest(file_id=file_id))

        turns = await asyncio.gather(others[0].turn(), delete_it(), *(each.turn() for each in others[1:]))

        assert set(turns) - {None} <= {"take", "make", "wait"}
        assert await in_agreement(world)


@on_postgresql
async def test_a_content_whose_last_file_goes_while_it_is_looked_at_is_made_anew(world):
    same = await made(world)
    (source,) = await world.files.results("tsk_1", 1)

    async with world.sql.transaction() as connection:
        await advisory_lock(connection, source.sha256)  # as whoever removes the bytes
        taking = asyncio.create_task(world.files.take(same, 15))
        await asyncio.wait([taking], timeout=0.5)
        waited = not taking.done()
        await connection.execute(delete(file).where(file.c.file_id == source.file_id))

    assert (waited, await taking) == (True, (Turn.MAKE, []))


async def test_a_taken_file_whose_source_goes_before_it_is_settled_keeps_its_bytes(world):
    same = await made(world)
    (source,) = list(await world.files.results("tsk_1", 1))

    class Meanwhile(Crashing):
        async def charge(self, *arguments):
            await world.keeping.delete("usr_ann", source.file_id, "req_1")
            await world.quota.charge(*arguments)

    slow = Keeping(world.files, world.blobs, Meanwhile(world.quota, count(), -1), world.judge)
    _, (taken,) = await slow.take(same, 100)

    assert taken.sha256 in world.contents()
    assert await in_agreement(world)


async def test_a_write_that_does_not_say_its_work_is_nobody_s_to_take(world):
    first, second = await asked(world, "tsk_1"), await asked(world, "tsk_2")
    await first.take()
    async with world.worker(**first.capability) as http:
        await http.post("/internal/v1/results", params={"name": "x.txt"}, content=b"small")

    assert await second.turn() == "wait"


@pytest.mark.parametrize("given", ["{", '{"inputFileIds": []}', json.dumps({"inputFileIds": ["fil_1"]})])
async def test_work_that_makes_no_sense_is_refused(world, given):
    async with world.worker(inputs=("fil_1",)) as http:
        refusal = await http.post("/internal/v1/results", params={"name": "x.txt", "work": given}, content=b"small")

    assert refusal.status_code == 400
