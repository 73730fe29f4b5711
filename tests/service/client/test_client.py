"""The Python client against a small installation behind Envoy."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from atelier.media.v1.media_pb2 import FORMAT_WEBP, Operation, Resize
from atelier.task.v1.task_pb2 import Task
from atelier_client import Atelier, FileCredentials, MemoryCredentials
from atelier_client.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    NotSignedIn,
    ResourceExhausted,
    TaskNotDone,
    Unreachable,
)

from mesh import errors
from tests.eventually import eventually
from tests.ports import free_port
from tests.service.client.conftest import HOST, PASSWORD, RESULT, Installation

SHRINK = Operation(resize=Resize(width=800, format=FORMAT_WEBP))


@pytest.fixture
async def atelier(installation: Installation) -> AsyncIterator[Atelier]:
    async with Atelier.connect(installation.url) as atelier:
        await atelier.register("ada", "ada@example.org", PASSWORD)
        await atelier.login("ada", PASSWORD)
        yield atelier


async def test_a_file_is_sent_worked_on_and_fetched(atelier: Atelier, tmp_path: Path) -> None:
    steps = []
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"\xff\xd8 photo")

    result = await atelier.run(photo, SHRINK, on_progress=steps.append)
    await atelier.download(result.file.file_id, tmp_path / "small.webp")

    assert (tmp_path / "small.webp").read_bytes() == RESULT
    assert result.task.state == Task.STATE_SUCCEEDED
    assert [step.stage for step in steps][-3:] == ["queued", "process", "process"]
    assert steps[0].stage == "sending"


async def test_an_upload_says_how_far_it_is_and_what_it_is(atelier: Atelier) -> None:
    told = []

    file = await atelier.upload(bytes(700_000), name="å b.webp", on_bytes=lambda *each: told.append(each))

    assert (file.name, file.content_type, file.size_bytes) == ("å b.webp", "image/webp", 700_000)
    await eventually(lambda: told[-1] == (700_000, 700_000))
    assert len(told) == 3


async def test_a_refusal_before_the_body_was_read_is_told_as_it_is(atelier: Atelier) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        await atelier.upload(bytes(30_000_000), name="huge.jpg")

    assert (refusal.value.reason, refusal.value.metadata) == ("BODY_TOO_LARGE", {"max": "10"})
    assert refusal.value.request_id


async def test_a_failed_download_leaves_no_file(atelier: Atelier, tmp_path: Path) -> None:
    with pytest.raises(NotFound) as refusal:
        await atelier.download("fil_none", tmp_path / "none.jpg")

    assert refusal.value.reason == "FILE_NOT_FOUND"
    assert list(tmp_path.glob("*none*")) == []


async def test_a_download_goes_to_an_open_file_too(atelier: Atelier, installation: Installation) -> None:
    sink = io.BytesIO()

    length = await atelier.download(installation.keep("a", "text/plain", b"abc").file_id, sink)

    assert (length, sink.getvalue()) == (3, b"abc")


async def test_an_image_is_fetched_at_another_size(atelier: Atelier) -> None:
    sink = io.BytesIO()

    await atelier.render("fil_1", sink, width=320, fit="fill", format="webp")

    assert sink.getvalue() == b"width=320&fit=fill&format=webp"


async def test_a_cancelled_upload_ends_at_once(atelier: Atelier, installation: Installation) -> None:
    installation.upload_pause_seconds = 1
    sending = asyncio.create_task(atelier.upload(bytes(50_000_000), name="long.jpg"))
    await asyncio.sleep(0.3)

    sending.cancel()

    async with asyncio.timeout(2):
        with pytest.raises(asyncio.CancelledError):
            await sending


async def test_an_expired_token_is_refreshed_unseen(atelier: Atelier, installation: Installation) -> None:
    installation.expire_tokens()

    user = await atelier.me()
    installation.expire_tokens()
    file = await atelier.upload(b"again", name="a.txt")

    assert (user.username, file.size_bytes, installation.refreshes) == ("ada", 5, 2)


async def test_a_token_about_to_expire_is_refreshed_before_it_is_sent(installation: Installation) -> None:
    installation.token_lifetime = timedelta(seconds=20)
    async with Atelier.connect(installation.url) as atelier:
        await atelier.register("ada", "ada@example.org", PASSWORD)
        await atelier.login("ada", PASSWORD)
        installation.token_lifetime = timedelta(minutes=5)

        await atelier.me()
        await atelier.me()

    assert installation.refreshes == 1


async def test_calls_at_once_refresh_once(atelier: Atelier, installation: Installation) -> None:
    installation.expire_tokens()

    await asyncio.gather(*(atelier.me() for _ in range(8)))

    assert installation.refreshes == 1


async def test_two_clients_of_one_file_refresh_once(installation: Installation, tmp_path: Path) -> None:
    def credentials() -> FileCredentials:
        return FileCredentials(installation.url, tmp_path / "config")

    async with (
        Atelier.connect(installation.url, credentials=credentials()) as first,
        Atelier.connect(installation.url, credentials=credentials()) as second,
    ):
        await first.register("ada", "ada@example.org", PASSWORD)
        await first.login("ada", PASSWORD)
        installation.expire_tokens()

        await asyncio.gather(first.me(), second.me())

    assert installation.refreshes == 1


async def test_a_session_that_has_ended_is_forgotten(atelier: Atelier, installation: Installation) -> None:
    installation.expire_tokens()
    installation.refresh_tokens.clear()

    with pytest.raises(NotSignedIn) as ended:
        await atelier.me()

    assert ended.value.reason == "REFRESH_TOKEN_INVALID"
    assert atelier.session() is None


async def test_logging_out_ends_the_session_on_the_server(atelier: Atelier, installation: Installation) -> None:
    await atelier.logout()

    assert installation.refresh_tokens == set()
    with pytest.raises(NotSignedIn):
        await atelier.me()


@pytest.mark.parametrize("why", [errors.Unavailable("This replica stops."), errors.Aborted("Too slow.")])
async def test_a_broken_watch_is_resumed_where_it_was(
    atelier: Atelier, installation: Installation, why: errors.MeshError
) -> None:
    installation.break_watch = why
    task = await atelier.create_task("fil_1", SHRINK)

    states = [seen.state async for seen in atelier.watch(task.task_id)]

    assert states == [Task.STATE_QUEUED, Task.STATE_RUNNING, Task.STATE_SUCCEEDED]
    assert installation.watched_from == ["", "1"]


async def test_a_watch_refreshes_its_token(atelier: Atelier, installation: Installation) -> None:
    task = await atelier.create_task("fil_1", SHRINK)
    installation.expire_tokens()

    states = [seen.state async for seen in atelier.watch(task.task_id)]

    assert (states[-1], installation.refreshes) == (Task.STATE_SUCCEEDED, 1)


async def test_a_run_that_is_cancelled_cancels_its_task(atelier: Atelier, installation: Installation) -> None:
    installation.held = True
    stages = []
    running = asyncio.create_task(
        atelier.run(b"photo", SHRINK, name="photo.jpg", on_progress=lambda step: stages.append(step.stage))
    )
    await eventually(lambda: "process" in stages)

    running.cancel()

    with pytest.raises(asyncio.CancelledError):
        await running
    assert installation.tasks["tsk_1"].state == Task.STATE_CANCELLED
    assert stages[-1] == "cancelled"


async def test_a_failed_task_is_an_error_with_its_reason(atelier: Atelier, installation: Installation) -> None:
    installation.failing = True

    with pytest.raises(TaskNotDone) as failure:
        await atelier.run(b"photo", SHRINK, name="photo.jpg")

    assert (failure.value.reason, failure.value.metadata) == ("INPUT_DAMAGED", {"taskId": "tsk_1"})
    assert failure.value.task.state == Task.STATE_FAILED


async def test_a_refusal_has_class_reason_and_metadata(atelier: Atelier, installation: Installation) -> None:
    installation.full = True

    with pytest.raises(ResourceExhausted) as refusal:
        await atelier.create_task("fil_1", SHRINK)

    assert (refusal.value.reason, refusal.value.metadata) == ("QUOTA_EXCEEDED", {"metric": "tasks"})
    with pytest.raises(AlreadyExists):
        await atelier.register("ada", "other@example.org", PASSWORD)


async def test_what_is_refused_for_a_moment_is_asked_for_again(atelier: Atelier, installation: Installation) -> None:
    made = []
    for call in (
        lambda: atelier.create_task("fil_1", SHRINK),
        lambda: atelier.create_task_batch([("fil_1", SHRINK)]),
        lambda: atelier.retry_task("tsk_1"),
    ):
        installation.reserved = 2
        made.append(await call())

    assert (len(made), len(installation.tasks)) == (3, 2)


async def test_what_stays_refused_is_not_asked_for_for_long(atelier: Atelier, installation: Installation) -> None:
    installation.reserved = 1000

    async with asyncio.timeout(10):
        with pytest.raises(ResourceExhausted) as refusal:
            await atelier.create_task("fil_1", SHRINK)

    assert refusal.value.retry_after_seconds == 0.1
    assert 0 < installation.reserved < 995


async def test_lists_turn_pages(atelier: Atelier) -> None:
    for _ in range(5):
        await atelier.create_task("fil_1", SHRINK)

    found = [task.task_id async for task in atelier.tasks()]

    assert found == ["tsk_5", "tsk_4", "tsk_3", "tsk_2", "tsk_1"]


async def test_all_that_happened_to_a_task_is_told_of_however_many_pages(atelier: Atelier) -> None:
    assert [event.sequence for event in await atelier.task_events("tsk_1")] == [1, 2, 3]


async def test_a_server_that_is_not_there_is_unreachable_for_calls_and_for_bytes() -> None:
    async with Atelier.connect(f"http://{HOST}:{free_port()}", credentials=MemoryCredentials()) as atelier:
        with pytest.raises(Unreachable) as call:
            await atelier.login("ada", PASSWORD)

    assert call.value.reason == "SERVER_UNREACHABLE"
    assert "refused" in call.value.metadata["why"]
