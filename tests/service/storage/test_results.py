import pytest
from atelier.storage.v1 import storage_pb2
from atelier.task.v1 import events_pb2, task_pb2
from atelier.user.v1 import user_pb2

from mesh.broker import Delivery
from mesh.errors import FailedPrecondition, NotFound, PermissionDenied
from services.storage.consumers import BINDINGS, TaskEvents
from services.storage.domain import NewFile
from services.storage.repository import SOME
from tests.service.storage.world import granted

PATH = "/internal/v1/results"


def succeeded(*file_ids: str) -> Delivery:
    event = events_pb2.TaskSucceeded(task_id="tsk_1", user_id="usr_ann", output_file_ids=file_ids)
    return Delivery(body=event.SerializeToString(), type=BINDINGS[0], message_id="evt_1", headers={})


def standing(state: str, attempt: int = 1, *file_ids: str) -> task_pb2.LookupTaskResponse:
    return task_pb2.LookupTaskResponse(
        state=task_pb2.Task.State.Value(f"STATE_{state}"), attempt=attempt, output_file_ids=file_ids
    )


async def write(world, body: bytes = b"result", attempt: int = 1, index: str = "0", **claims):
    async with world.worker(attempt, **claims) as http:
        return await http.post(PATH, params={"name": "out.txt", "index": index}, content=body)


async def listed(world) -> list[str]:
    return [file.file_id for file in (await world.stub().ListFiles(storage_pb2.ListFilesRequest())).files]


async def test_a_result_is_its_owners_at_once_and_listed_when_the_task_took_it(world):
    result = (await write(world)).json()
    found = await world.stub().GetFile(storage_pb2.GetFileRequest(file_id=result["fileId"]))
    before = await listed(world)

    await TaskEvents(world.files).take([succeeded(result["fileId"])])

    assert (found.task_id, found.size_bytes) == ("tsk_1", 6)
    assert (before, await listed(world)) == ([], [result["fileId"]])
    assert world.users.used == {result["fileId"]: 6}


async def test_a_task_takes_no_result_of_another_task(world):
    result = (await write(world, task_id="tsk_2")).json()

    await TaskEvents(world.files).take([succeeded(result["fileId"])])

    assert await listed(world) == []


async def test_a_result_is_charged_by_a_user_service_that_only_sets_aside(world):
    world.users.is_old = True

    result = (await write(world)).json()

    assert world.users.reservations[result["fileId"]].state == user_pb2.Reservation.STATE_SETTLED


async def test_a_result_written_again_answers_the_first_file_and_is_charged_once(world):
    first = (await write(world)).json()

    again = (await write(world, b"encoded differently")).json()

    assert again == first
    assert world.users.used == {first["fileId"]: 6}
    assert world.contents() == {first["sha256"]}


async def test_an_attempt_has_a_result_for_each_index_and_a_repeated_one_answers_its_own(world):
    first, second = (await write(world)).json(), (await write(world, b"smaller", index="1")).json()

    again = (await write(world, b"encoded differently", index="1")).json()

    assert (again, again["fileId"] != first["fileId"]) == (second, True)
    assert world.users.used == {first["fileId"]: 6, second["fileId"]: 7}


@pytest.mark.parametrize(("index", "reason"), [("16", "FIELD_OUT_OF_RANGE"), ("-1", "QUERY_MALFORMED")])
async def test_an_index_out_of_bounds_is_refused(world, index, reason):
    refusal = await write(world, index=index)

    assert (refusal.status_code, refusal.json()["details"][0]["reason"]) == (400, reason)
    assert refusal.json()["details"][0]["metadata"]["value"] == index


async def test_a_discard_takes_all_results_of_its_attempt_and_none_of_another(world):
    await write(world)
    await write(world, b"smaller", index="1")
    newer = (await write(world, b"newer", attempt=2, index="1")).json()

    await world.stub(None, caller="media-worker").DiscardResult(storage_pb2.DiscardResultRequest(capability=granted()))

    assert await world.rows() == {newer["fileId"]: newer["sha256"]}
    assert world.users.used == {newer["fileId"]: 5}


async def test_a_discard_leaves_all_when_the_task_took_them(world):
    ids = [(await write(world, f"{index}".encode(), index=f"{index}")).json()["fileId"] for index in range(2)]
    world.tasks.known["tsk_1"] = standing("SUCCEEDED", 1, *ids)

    with pytest.raises(FailedPrecondition) as refusal:
        await world.stub(None, caller="media-worker").DiscardResult(
            storage_pb2.DiscardResultRequest(capability=granted())
        )

    assert refusal.value.reason == "RESULT_IN_USE"
    assert set(await world.rows()) == set(ids)


async def test_each_attempt_has_a_result_of_its_own(world):
    first = (await write(world, attempt=1)).json()

    second = (await write(world, attempt=2)).json()

    assert second["fileId"] != first["fileId"]


async def test_a_result_larger_than_its_capability_allows_is_refused(world):
    refusal = await write(world, b"result", max_bytes=5)

    assert (refusal.status_code, refusal.json()["details"][0]["reason"]) == (413, "FILE_TOO_LARGE")
    assert refusal.json()["details"][0]["metadata"] == {"limit_bytes": "5"}
    assert (await world.rows(), world.contents()) == ({}, set())


async def test_a_forged_capability_is_refused(world):
    refusal = await write(world, key="1" * 64)

    assert (refusal.status_code, refusal.json()["details"][0]["reason"]) == (403, "CAPABILITY_INVALID")


async def test_only_the_worker_may_write_results_even_with_a_capability(world):
    async with world.http(None, "media", **{"x-atelier-capability": granted()}) as http:
        refusal = await http.post(PATH, params={"name": "a"}, content=b"result")

    assert (refusal.status_code, refusal.json()["details"][0]["metadata"]["caller"]) == (403, "media")


async def test_a_worker_reads_the_inputs_that_its_capability_names_and_no_others(world):
    named = (await world.upload(b"input")).json()["fileId"]
    other = (await world.upload(b"other")).json()["fileId"]

    async with world.worker(inputs=(named,)) as http:
        read = await http.get(f"/internal/v1/inputs/{named}")
        refusal = await http.get(f"/internal/v1/inputs/{other}")

    assert read.content == b"input"
    assert (refusal.status_code, refusal.json()["details"][0]["reason"]) == (403, "CAPABILITY_INVALID")
    assert refusal.json()["details"][0]["metadata"] == {"file_id": other}


async def test_a_discarded_result_is_gone_with_its_bytes_and_its_charge(world):
    await write(world)
    stub = world.stub(None, caller="media-worker")

    await stub.DiscardResult(storage_pb2.DiscardResultRequest(capability=granted()))
    await stub.DiscardResult(storage_pb2.DiscardResultRequest(capability=granted()))

    assert (await world.rows(), world.contents(), world.users.used) == ({}, set(), {})


async def test_a_result_that_the_task_took_is_not_discarded_though_the_event_is_late(world):
    result = (await write(world)).json()
    world.tasks.known["tsk_1"] = standing("SUCCEEDED", 1, result["fileId"])

    with pytest.raises(FailedPrecondition) as refusal:
        await world.stub(None, caller="media-worker").DiscardResult(
            storage_pb2.DiscardResultRequest(capability=granted())
        )

    assert refusal.value.reason == "RESULT_IN_USE"
    assert refusal.value.metadata == {"file_id": result["fileId"]}


async def test_a_discard_needs_the_capability_of_that_attempt(world):
    with pytest.raises(PermissionDenied) as refusal:
        await world.stub(None, caller="media-worker").DiscardResult(
            storage_pb2.DiscardResultRequest(capability=granted(key="1" * 64))
        )

    assert refusal.value.reason == "CAPABILITY_INVALID"


async def test_a_fresh_result_may_be_the_next_tasks_input_before_the_event_arrives(world):
    result = (await write(world)).json()
    world.tasks.known["tsk_1"] = standing("SUCCEEDED", 1, result["fileId"])

    found = await world.stub(None, caller="task").StatFile(
        storage_pb2.StatFileRequest(file_id=result["fileId"], user_id="usr_ann")
    )

    assert found.file_id == result["fileId"]
    assert await listed(world) == [result["fileId"]]


async def test_a_result_that_no_task_took_is_no_input(world):
    result = (await write(world)).json()
    world.tasks.known["tsk_1"] = standing("RUNNING")

    with pytest.raises(NotFound) as refusal:
        await world.stub(None, caller="task").StatFile(
            storage_pb2.StatFileRequest(file_id=result["fileId"], user_id="usr_ann")
        )

    assert refusal.value.metadata == {"file_id": result["fileId"]}


async def test_many_files_are_told_of_but_for_those_that_are_not_surely_the_user_s(world):
    result = (await write(world)).json()["fileId"]
    async with world.http() as own, world.http("usr_bob") as another:
        mine = (await own.post("/api/v1/files", params={"name": "a.txt"}, content=b"mine")).json()["fileId"]
        theirs = (await another.post("/api/v1/files", params={"name": "a.txt"}, content=b"mine")).json()["fileId"]

    answer = await world.stub(None, caller="task").StatFiles(
        storage_pb2.StatFilesRequest(file_ids=[mine, theirs, result, "fil_none"], user_id="usr_ann")
    )

    assert [(each.file_id, each.content_type) for each in answer.files] == [(mine, "text/plain")]


async def test_what_is_still_on_its_way_is_neither_counted_nor_told_of(world):
    new = NewFile("fil_coming", "usr_ann", "a.txt", "text/plain", 5, "0" * 64)
    await world.files.begin(new, "")

    usage = await world.stub().GetUsage(storage_pb2.GetUsageRequest())
    told = await world.stub(None, caller="task").StatFiles(
        storage_pb2.StatFilesRequest(file_ids=["fil_coming"], user_id="usr_ann")
    )

    assert (usage.file_count, usage.size_bytes, await listed(world)) == (0, 0, [])
    assert not told.files


async def test_a_result_whose_event_was_lost_is_confirmed_by_asking(world):
    result = (await write(world)).json()
    world.tasks.known["tsk_1"] = standing("SUCCEEDED", 1, result["fileId"])
    await world.age()

    await world.upkeep.tend()

    assert await listed(world) == [result["fileId"]]


async def test_results_whose_tasks_are_told_by_nobody_hold_up_no_other(world):
    for number in range(SOME):
        await write(world, task_id=f"tsk_broken{number}")
        world.tasks.broken.add(f"tsk_broken{number}")
    result = (await write(world)).json()
    world.tasks.known["tsk_1"] = standing("SUCCEEDED", 1, result["fileId"])
    await world.age()

    for _ in range(5):  # in each of which one of 101 is left out
        await world.upkeep.tend()

    assert await listed(world) == [result["fileId"]]


@pytest.mark.parametrize(
    "task", [None, standing("FAILED"), standing("CANCELLED"), standing("SUCCEEDED", 2, "fil_2"), standing("RUNNING", 2)]
)
async def test_a_result_that_its_task_will_never_take_is_removed(world, task):
    await write(world)
    if task is not None:
        world.tasks.known["tsk_1"] = task
    await world.age()

    await world.upkeep.tend()

    assert (await world.rows(), world.contents(), world.users.used) == ({}, set(), {})


async def test_a_result_whose_task_still_works_is_left_alone(world):
    result = (await write(world)).json()
    world.tasks.known["tsk_1"] = standing("RUNNING")
    await world.age()

    await world.upkeep.tend()

    assert await world.rows() == {result["fileId"]: result["sha256"]}
    assert world.users.used == {result["fileId"]: 6}


async def test_a_young_result_is_not_asked_about(world):
    result = (await write(world)).json()

    await world.upkeep.tend()

    assert await world.rows() == {result["fileId"]: result["sha256"]}
