"""The same work once: real workers with real child processes, over a storage service that keeps what they make."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest
from atelier.media.v1 import media_pb2
from atelier.storage.v1 import storage_pb2
from atelier.storage.v1.storage_pb2_grpc import StorageServiceStub
from atelier.task.v1 import task_pb2_grpc
from sqlalchemy import text

from mesh import bounds
from services.media import domain, peers, processes
from services.media.config import WorkerConfig
from services.media.convert import operation_from
from services.media.worker.capacity import CPU
from services.media.worker.tasks import Worker
from tests.databases import SqliteDatabases
from tests.eventually import eventually
from tests.mesh_server import serving
from tests.photographs import photograph
from tests.service.media import conftest
from tests.service.media.conftest import SHORT, Addresses, Permits
from tests.service.storage.world import World, granted, opened

# A second or so of work.
LARGE = media_pb2.Operation(
    resize=media_pb2.Resize(width=2000, fit=media_pb2.Resize.FIT_FIT, format=media_pb2.FORMAT_AVIF)
)


BY_FACES = media_pb2.Operation(
    smart_crop=media_pb2.SmartCrop(width=40, height=40, interest=media_pb2.SmartCrop.INTEREST_FACES)
)

MARKED = media_pb2.Operation(watermark=media_pb2.Watermark(text=media_pb2.Watermark.Text(content="Hello")))

FACE_DETECTOR, FONTS = "opencv-python-headless 4", "fonts 1"


class Tasks(conftest.Tasks):
    """Gives capabilities that storage believes."""

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[str, str] = {}

    async def ClaimTask(self, request, context):
        answer = await super().ClaimTask(request, context)
        if answer.HasField("assignment"):
            task = answer.assignment.task
            answer.assignment.capability = granted(
                task_id=task.task_id, user_id=self.owners[task.task_id], inputs=(task.input_file_id,)
            )
        return answer


class House:
    """Workers of one slot each, and all that they need."""

    def __init__(self, files: World, tasks: Tasks, permits: Permits) -> None:
        self.files = files
        self.tasks = tasks
        self.permits = permits
        self.slots: list[processes.Slot] = []
        self.running: list[asyncio.Task[None]] = []

    async def stop(self) -> None:
        """Stop the workers."""
        for each in self.running:
            each.cancel()
        if self.running:
            await asyncio.wait(self.running)

    @property
    def jobs(self) -> int:
        """How often a child was given work."""
        return sum(slot._jobs for slot in self.slots)

    async def put(self, content: bytes | None = None, user: str = "usr_ann", name: str = "rocket.jpg") -> str:
        answer = await self.files.upload(photograph().read_bytes() if content is None else content, name, user)
        return answer.json()["fileId"]

    def do(self, file_id: str, operation: media_pb2.Operation = SHORT, user: str = "usr_ann") -> str:
        task_id = self.tasks.queue(operation, file_id)
        self.tasks.owners[task_id] = user
        self.permits.waiting.put_nowait(1)
        return task_id

    async def result(self, task_id: str, within_seconds: float = 30) -> storage_pb2.File:
        file_id = await eventually(lambda: self.tasks.completed.get(task_id), within_seconds)
        stub = self.files.stub(self.tasks.owners[task_id])
        return await stub.GetFile(storage_pb2.GetFileRequest(file_id=file_id))


Start = Callable[..., Awaitable[House]]


@pytest.fixture
async def start(tmp_path: Path, sqlite_databases: SqliteDatabases) -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:
        hold = stack.enter_async_context
        files = await hold(opened(tmp_path, await sqlite_databases.new("storage", tmp_path)))
        files.users.limit = 100 * 1024**2
        tasks = Tasks()
        house = House(files, tasks, Permits())
        server = await hold(serving(partial(task_pb2_grpc.add_TaskServiceServicer_to_server, tasks)))

        async def started(workers: int = 1, **settings: str) -> House:
            for number in range(len(house.slots), len(house.slots) + workers):
                config = WorkerConfig.model_validate(
                    {
                        "ATELIER_CONSUL_URL": "", "ATELIER_BROKER_URL": "", "ATELIER_CONTROL_ADDRESSES": "",
                        "ATELIER_DATA_DIR": tmp_path, "ATELIER_SECRETS_DIR": tmp_path,
                        "ATELIER_INSTANCE": f"media-worker-{number}", "slots": 1,
                    }
                )  # fmt: skip
                slots = await hold(processes.opened(config))
                house.slots += slots
                address = files.server.http_url.removeprefix("https://")
                worker = Worker(
                    task_pb2_grpc.TaskServiceStub(server.channel(caller="media-worker")),
                    StorageServiceStub(files.server.channel(caller="media-worker")),
                    await hold(peers.opened(Addresses(address), files.server.tls("media-worker"))),
                    slots,
                    pools=[CPU],
                    worker_id=config.instance,
                    drain_seconds=0.3,
                    **{"face_detector": FACE_DETECTOR, "fonts": FONTS, **settings},
                )
                house.running.append(asyncio.create_task(worker.run(house.permits)))
                stack.push_async_callback(house.stop)
            return house

        yield started


async def test_the_same_task_again_decodes_nothing_and_is_charged_as_the_first(start: Start):
    house = await start()
    file_id = await house.put()
    first = await house.result(house.do(file_id))

    second = await house.result(house.do(file_id))

    assert house.jobs == 1
    assert (second.sha256, second.name) == (first.sha256, "rocket-100x67.webp")
    assert second.file_id != first.file_id
    assert house.files.users.used[second.file_id] == house.files.users.used[first.file_id]
    assert second.provenance == first.provenance
    assert (first.provenance.input_file_id, first.provenance.operation) == (file_id, "resize")
    assert first.provenance.encoder == processes.ENCODER


async def test_another_person_s_same_bytes_give_the_same_result_under_their_own_name(start: Start):
    house = await start()
    first = await house.result(house.do(await house.put()))
    his = await house.put(user="usr_bob", name="holiday.jpg")

    second = await house.result(house.do(his, user="usr_bob"))

    assert (house.jobs, second.sha256, second.name) == (1, first.sha256, "holiday-100x67.webp")
    assert second.provenance.input_file_id == his


async def test_a_default_that_is_said_is_the_same_work_and_another_value_is_not(start: Start):
    house = await start()
    file_id = await house.put()
    said = media_pb2.Operation()
    said.CopyFrom(SHORT)
    said.resize.quality, said.resize.fit = 80, media_pb2.Resize.FIT_INSIDE

    await house.result(house.do(file_id))
    await house.result(house.do(file_id, said))
    once = house.jobs
    said.resize.quality = 81
    await house.result(house.do(file_id, said))

    assert (once, house.jobs) == (1, 2)


@pytest.mark.parametrize(
    ("operation", "other", "told"),
    [(BY_FACES, {"face_detector": ""}, ("", FACE_DETECTOR)), (MARKED, {"fonts": "fonts 0"}, ("fonts 0", FONTS))],
    ids=["faces", "text"],
)
async def test_what_a_worker_does_with_other_means_is_other_work(
    start: Start, operation: media_pb2.Operation, other: dict[str, str], told: tuple[str, str]
):
    house = await start(**other)
    file_id = await house.put()
    first = await house.result(house.do(file_id, operation))
    await house.result(house.do(file_id, SHORT))
    await house.stop()

    await start()
    second = await house.result(house.do(file_id, operation))
    await house.result(house.do(file_id, SHORT))

    assert house.jobs == 3  # what needs neither faces nor fonts was done once
    assert (first.provenance.model, second.provenance.model) == told


def test_fonts_are_told_apart_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "noto").mkdir()
    none = processes.fonts([tmp_path, tmp_path / "not there"])
    (tmp_path / "noto" / "Sans.ttf").write_bytes(b"1")
    one = processes.fonts([tmp_path])
    again = processes.fonts([tmp_path])
    (tmp_path / "noto" / "Sans.ttf").write_bytes(b"12")

    newer = processes.fonts([tmp_path])

    assert (one, len({none, one, newer})) == (again, 3)


async def test_two_workers_at_once_decode_once(start: Start):
    house = await start(workers=2)
    file_id = await house.put()

    tasks = [house.do(file_id, LARGE) for _ in range(3)]

    results = [await house.result(task_id) for task_id in tasks]
    assert (house.jobs, len({each.sha256 for each in results}), len({each.file_id for each in results})) == (1, 1, 3)


async def test_what_a_dead_worker_was_to_make_another_makes(start: Start):
    house = await start()
    file_id = await house.put()
    stub = house.files.stub(None, caller="media-worker")
    dead = storage_pb2.TakeResultsRequest(capability=granted(9, inputs=(file_id,)), work=await worked(house, file_id))
    await stub.TakeResults(dead)
    task_id = house.do(file_id)
    await eventually(lambda: house.tasks.renewals)  # it waits, and keeps its own lease
    waited = house.jobs

    async with house.files.sql.transaction() as connection:
        await connection.execute(text("UPDATE making SET until = until - 20000000"))

    await house.result(task_id)
    assert (waited, house.jobs) == (0, 1)


async def worked(house: House, file_id: str) -> storage_pb2.Work:
    said = domain.canonical(operation_from(SHORT), {})
    return storage_pb2.Work(input_file_ids=[file_id], operation=said, encoder=processes.ENCODER)


async def test_who_waits_for_another_hears_of_a_cancel_and_gives_its_slot_back(start: Start):
    house = await start()
    file_id, other = await house.put(), await house.put(b"\xff\xd8\xff no image", name="a")
    stub = house.files.stub(None, caller="media-worker")
    await stub.TakeResults(
        storage_pb2.TakeResultsRequest(capability=granted(9, inputs=(file_id,)), work=await worked(house, file_id))
    )
    task_id = house.do(file_id)
    await eventually(lambda: house.tasks.renewals)

    house.tasks.lost.add(task_id)

    failing = house.do(other)
    await eventually(lambda: house.tasks.failed.get(failing), within_seconds=10)
    assert task_id not in house.tasks.completed


async def test_the_longest_pipeline_is_done(start: Start):
    house = await start()
    mark = media_pb2.Watermark(text=media_pb2.Watermark.Text(content="😀" * 200, font="A" * 64, colour="#ffffff"))
    steps = [media_pb2.Pipeline.Step(watermark=mark) for _ in range(16)]
    operation = media_pb2.Operation(pipeline=media_pb2.Pipeline(steps=steps))
    bounds.check(operation)

    task_id = house.do(await house.put(), operation)
    ended = await eventually(lambda: {*house.tasks.completed, *house.tasks.failed}, within_seconds=60)

    assert (ended, [*house.tasks.failed.values()]) == ({task_id}, [])
    assert (await house.result(task_id)).provenance.operation == "pipeline"


async def test_work_that_fails_keeps_nobody_waiting(start: Start):
    house = await start(workers=2)
    file_id = await house.put(photograph().read_bytes()[:9000])

    tasks = [house.do(file_id) for _ in range(3)]

    for task_id in tasks:
        failure = await eventually(lambda: house.tasks.failed.get(task_id), within_seconds=8)  # noqa: B023 - called in this round only
        assert failure.error.reason == "INPUT_DAMAGED"


async def test_a_deleted_result_is_made_anew(start: Start):
    house = await start()
    file_id = await house.put()
    first = await house.result(house.do(file_id))
    await house.files.stub().DeleteFile(storage_pb2.DeleteFileRequest(file_id=first.file_id))

    second = await house.result(house.do(file_id))

    assert (house.jobs, second.sha256) == (2, first.sha256)
    assert second.sha256 in house.files.contents()
