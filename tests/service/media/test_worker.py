from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
import time

import psutil
import pytest
from atelier.media.v1 import media_pb2
from PIL import Image

from mesh.errors import Aborted, DeadlineExceeded, Internal, MeshError, Unavailable, Unimplemented
from tests.eventually import eventually
from tests.service.media.conftest import LEASE_SECONDS, LONG, SHORT, Start
from tests.slow_image import slow_image


def memory_of_jobs() -> int:
    """Return the resident memory of all processes that work for this one's workers."""
    children = [each for each in psutil.Process().children() if "services.media.worker.child" in each.cmdline()]
    return sum(child.memory_info().rss for child in children)


async def test_a_task_becomes_a_result_with_a_telling_name(start: Start):
    world = await start()

    task_id = world.do()

    assert await eventually(lambda: world.tasks.completed.get(task_id)) == f"fil_of_may-{task_id}"
    name, content_type, content = world.storage.results[f"may-{task_id}"]
    assert (name, content_type) == ("rocket-100x67.webp", "image/webp")
    assert Image.open(io.BytesIO(content)).size == (100, 67)
    await eventually(lambda: not world.left_behind())


async def test_tasks_beyond_the_permits_are_done_as_slots_become_free(start: Start):
    world = await start(slots=2)
    without_permit = [world.tasks.queue() for _ in range(5)]

    world.permits.waiting.put_nowait(1)

    await eventually(lambda: set(world.tasks.completed) == set(without_permit), within_seconds=30)
    await eventually(lambda: not world.left_behind())
    assert world.tasks.claims == 5  # whoever got the last one was told so


async def test_a_slot_that_becomes_free_uses_the_permit_in_hand(start: Start):
    world = await start(slots=1)
    world.storage.delay_seconds = 0.5
    tasks = [world.tasks.queue() for _ in range(3)]

    for _ in tasks:
        world.permits.waiting.put_nowait(1)

    await eventually(lambda: set(world.tasks.completed) == set(tasks), within_seconds=30)
    await eventually(world.permits.waiting.empty)
    assert world.tasks.claims == 3  # one for each permit


async def test_a_task_may_have_several_results_in_order(start: Start):
    world = await start()
    sizes = [media_pb2.Resize(width=width, format=media_pb2.FORMAT_WEBP) for width in (100, 50, 200)]

    task_id = world.do(media_pb2.Operation(thumbnails=media_pb2.Thumbnails(sizes=sizes)))

    completed = await eventually(lambda: world.tasks.completed.get(task_id))
    assert completed == f"fil_of_may-{task_id} fil_of_may-{task_id}-1 fil_of_may-{task_id}-2"
    names = [world.storage.results[each.removeprefix("fil_of_")][0] for each in completed.split()]
    assert names == ["rocket-100x67.webp", "rocket-50x33.webp", "rocket-200x133.webp"]
    await eventually(lambda: not world.left_behind())


async def test_a_name_in_any_script_is_kept(start: Start):
    world = await start()
    world.storage.inputs["fil_x"] = ("富士山 für alle.jpg", world.storage.inputs["fil_rocket"][1])

    task_id = world.do(file_id="fil_x")

    await eventually(lambda: task_id in world.tasks.completed)
    assert world.storage.results[f"may-{task_id}"][0] == "富士山 für alle-100x67.webp"


async def test_a_mark_is_fetched_too(start: Start):
    world = await start()
    mark = media_pb2.Watermark.Image(file_id="fil_coffee", scale=0.5)

    task_id = world.do(media_pb2.Operation(watermark=media_pb2.Watermark(image=mark, opacity=1)))

    await eventually(lambda: task_id in world.tasks.completed)
    assert world.storage.results[f"may-{task_id}"][0] == "rocket-640x427.jpg"


async def test_progress_is_reported_while_it_works(start: Start):
    world = await start()

    task_id = world.do(LONG, "fil_retina")

    await eventually(lambda: "process" in world.tasks.stages(task_id), within_seconds=20)
    fractions = [each.progress.fraction for each in world.tasks.renewals]
    assert fractions == sorted(fractions)
    assert fractions[-1] < 1


async def test_who_makes_what_others_wait_for_says_so_for_as_long_as_it_does(start: Start):
    world = await start()
    world.storage.making_seconds = 1

    task_id = world.do(LONG, "fil_retina")

    await eventually(lambda: world.storage.asked > 3, within_seconds=20)
    world.tasks.lost.add(task_id)
    await eventually(lambda: world.storage.discarded)
    asked, world.storage.making_seconds = world.storage.asked, 15
    after = world.do()
    await eventually(lambda: after in world.tasks.completed)
    assert world.storage.asked == asked + 1


@pytest.mark.parametrize("failure", [Unavailable, Aborted, DeadlineExceeded, Unimplemented, Internal])
async def test_where_nobody_knows_what_was_made_before_it_is_made(start: Start, failure: type[MeshError]):
    world = await start()
    world.storage.ignorance = failure("No.")

    task_id = world.do()

    await eventually(lambda: task_id in world.tasks.completed)


async def test_a_damaged_input_fails_for_good_with_its_reason(start: Start):
    world = await start()
    world.storage.inputs["fil_cut"] = ("cut.jpg", world.storage.inputs["fil_rocket"][1][:9000])

    task_id = world.do(file_id="fil_cut")

    failure = await eventually(lambda: world.tasks.failed.get(task_id))
    assert (failure.error.reason, failure.error.code, failure.transient) == ("INPUT_DAMAGED", 3, False)
    await eventually(lambda: world.storage.discarded == [f"may-{task_id}"])


async def test_a_missing_input_fails_for_good_with_storages_reason(start: Start):
    world = await start()

    task_id = world.do(file_id="fil_gone")

    failure = await eventually(lambda: world.tasks.failed.get(task_id))
    assert (failure.error.reason, failure.transient) == ("FILE_NOT_FOUND", False)


async def test_storage_away_is_waited_for(start: Start):
    world = await start()
    world.storage.away = True
    task_id = world.do()
    await eventually(lambda: world.storage.reads)

    world.storage.away = False

    await eventually(lambda: task_id in world.tasks.completed)


async def test_a_result_that_storage_undid_is_sent_again(start: Start):
    world = await start()
    world.storage.undone = 2

    task_id = world.do()

    await eventually(lambda: task_id in world.tasks.completed)
    assert world.storage.undone == 0


@pytest.mark.parametrize(("state", "reason"), [("away", "STORAGE_UNAVAILABLE"), ("full", "STORAGE_FULL")])
async def test_storage_that_stays_away_or_full_is_transient(start: Start, state: str, reason: str):
    world = await start()
    setattr(world.storage, state, True)

    task_id = world.do()

    failure = await eventually(lambda: world.tasks.failed.get(task_id), within_seconds=10)
    assert (failure.error.reason, failure.transient) == (reason, True)


async def test_a_worker_without_room_for_an_input_says_so(start: Start):
    world = await start()
    world.slots[0].make_folder()
    (world.slots[0].folder / "input").symlink_to("/dev/full")

    task_id = world.do()

    failure = await eventually(lambda: world.tasks.failed.get(task_id))
    assert (failure.error.reason, failure.transient) == ("STORAGE_FULL", True)


async def test_a_cancelled_decode_is_stopped_within_two_seconds_and_its_memory_is_free(start: Start):
    world = await start()
    world.storage.inputs["fil_slow"] = ("slow.avif", slow_image())
    before = world.do()
    await eventually(lambda: before in world.tasks.completed)
    child = psutil.Process(world.slots[0].pid)
    idle_bytes = child.memory_info().rss
    task_id = world.do(SHORT, "fil_slow")
    await eventually(lambda: child.memory_info().rss > idle_bytes + 20 * 1024**2, within_seconds=30)

    world.tasks.lost.add(task_id)

    await eventually(lambda: not child.is_running(), within_seconds=2)
    assert memory_of_jobs() <= idle_bytes
    await eventually(lambda: world.storage.discarded == [f"may-{task_id}"])
    await eventually(lambda: not world.left_behind())
    after = world.do()
    await eventually(lambda: after in world.tasks.completed)
    assert task_id not in world.tasks.failed


async def test_a_killed_process_costs_one_attempt_and_not_the_worker(start: Start):
    world = await start()
    task_id = world.do(LONG, "fil_retina")
    await eventually(lambda: "process" in world.tasks.stages(task_id), within_seconds=20)

    os.kill(world.slots[0].pid, signal.SIGKILL)

    failure = await eventually(lambda: world.tasks.failed.get(task_id))
    assert (failure.error.reason, failure.transient, failure.returned) == ("WORKER_CRASHED", True, False)
    after = world.do()
    await eventually(lambda: after in world.tasks.completed)


async def test_a_slot_whose_folder_cannot_be_made_is_there_for_the_next_task(start: Start):
    world = await start()
    slot = world.slots[0]
    shutil.rmtree(slot.folder, ignore_errors=True)
    slot.folder.write_bytes(b"")  # as a disk without room for a folder

    before = [world.do() for _ in range(2)]
    await eventually(lambda: set(world.tasks.failed) == set(before))
    await eventually(lambda: set(world.storage.discarded) == {f"may-{task_id}" for task_id in before})
    slot.folder.unlink()
    after = world.do()

    await eventually(lambda: after in world.tasks.completed)


async def test_an_operation_out_of_time_fails_for_good(start: Start):
    world = await start(job_seconds=1)

    task_id = world.do(LONG, "fil_retina")

    failure = await eventually(lambda: world.tasks.failed.get(task_id))
    assert (failure.error.reason, failure.transient) == ("TIME_LIMIT_EXCEEDED", False)


async def test_a_decode_that_the_kernel_gives_no_memory_is_transient_and_the_process_replaced(start: Start):
    world = await start(job_memory_bytes=200 * 1024**2)  # of 600 MiB that it needs
    world.storage.inputs["fil_slow"] = ("slow.avif", slow_image())
    child = psutil.Process(world.slots[0].pid)
    await eventually(lambda: child.rlimit(psutil.RLIMIT_DATA)[0] == 200 * 1024**2, within_seconds=20)

    task_id = world.do(SHORT, "fil_slow")

    failure = await eventually(lambda: world.tasks.failed.get(task_id), within_seconds=30)
    assert (failure.error.reason, failure.transient, failure.returned) == ("OUT_OF_MEMORY", True, False)
    assert not child.is_running()
    after = world.do()
    await eventually(lambda: after in world.tasks.completed)


async def test_a_worker_without_a_lease_stops_by_its_own_clock(start: Start):
    world = await start()
    task_id = world.do(LONG, "fil_retina")
    await eventually(lambda: task_id in {each.task_id for each in world.tasks.renewals})
    child = psutil.Process(world.slots[0].pid)

    world.tasks.failure = Unavailable("Away.")

    await eventually(lambda: not child.is_running(), within_seconds=4)
    world.tasks.failure = None
    after = world.do()
    await eventually(lambda: after in world.tasks.completed)
    assert task_id not in world.tasks.completed


async def test_a_lease_counts_from_when_it_was_asked_for(start: Start):
    world = await start()
    world.tasks.claim_seconds = LEASE_SECONDS  # it is over when its holder learns of it

    task_id = world.do(LONG, "fil_retina")

    await eventually(lambda: world.storage.discarded == [f"may-{task_id}"], within_seconds=20)
    assert (world.tasks.renewals, world.tasks.completed) == ([], {})


async def test_a_renewed_lease_counts_from_when_it_was_asked_for(start: Start):
    world = await start()
    world.tasks.renewal_seconds = 0.4 * LEASE_SECONDS  # what is left then is too short for another answer

    task_id = world.do(LONG, "fil_retina")

    await eventually(lambda: world.storage.discarded == [f"may-{task_id}"], within_seconds=20)
    assert world.tasks.completed == {}


async def test_an_end_that_nobody_takes_down_is_told_again(start: Start):
    world = await start()
    world.tasks.refused_reports = 2

    task_id = world.do()

    await eventually(lambda: task_id in world.tasks.completed)
    assert world.storage.discarded == []


async def test_a_result_that_may_have_counted_is_kept_when_its_lease_is_over(start: Start):
    world = await start(slots=1)
    world.tasks.loses_answers = True
    task_id = world.do()
    await eventually(lambda: task_id in world.tasks.completed)

    world.do()

    await eventually(lambda: world.tasks.claims == 2, within_seconds=20)  # who told of the first has given up
    assert world.storage.discarded == []


async def test_a_result_that_lost_its_lease_is_discarded(start: Start):
    world = await start()
    task_id = world.tasks.queue()
    world.tasks.lost.add(task_id)

    world.permits.waiting.put_nowait(1)

    await eventually(lambda: world.storage.discarded == [f"may-{task_id}"])
    assert not world.tasks.completed


async def test_no_more_is_claimed_than_there_are_slots(start: Start):
    world = await start(slots=1)
    first = world.do(LONG, "fil_retina")
    second = world.do()
    await eventually(lambda: first in {each.task_id for each in world.tasks.renewals})

    assert world.tasks.claims == 1
    world.tasks.lost.add(first)
    await eventually(lambda: second in world.tasks.completed)


async def test_as_many_tasks_compute_as_there_are_cores_and_the_others_wait(start: Start, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    world = await start(slots=2)
    computing = psutil.Process(world.slots[0].pid)

    computing.suspend()
    first = world.do(SHORT)
    await eventually(lambda: f"may-{first}" in world.storage.reads)
    second = world.do(SHORT)
    await eventually(lambda: f"may-{second}" in world.storage.reads)
    await asyncio.sleep(1)  # there is nothing to wait for: nothing happens
    assert world.tasks.completed == {}

    computing.resume()
    await eventually(lambda: {first, second} <= set(world.tasks.completed))


async def test_a_permit_without_a_task_is_used_up(start: Start):
    world = await start()

    world.permits.waiting.put_nowait(1)
    await eventually(lambda: world.tasks.claims == 1)
    task_id = world.do()

    await eventually(lambda: task_id in world.tasks.completed)
    assert world.permits.returned == 0


async def test_a_permit_is_kept_while_the_task_service_is_away(start: Start):
    world = await start()
    world.tasks.failure = Unavailable("Away.")
    task_id = world.do()
    await eventually(lambda: world.permits.returned >= 2)

    world.tasks.failure = None

    await eventually(lambda: task_id in world.tasks.completed)


async def test_nothing_is_claimed_while_no_storage_is_there(start: Start):
    world = await start()
    there, world.instances.listed = world.instances.listed, []
    task_id = world.do()
    await eventually(lambda: world.permits.returned >= 2)
    assert world.tasks.claims == 0

    world.instances.listed = there

    await eventually(lambda: task_id in world.tasks.completed)


async def test_a_stopping_worker_gives_back_what_it_cannot_finish(start: Start):
    world = await start(drain_seconds=0.2)
    running = world.do(LONG, "fil_retina")
    waiting = world.do()
    await eventually(lambda: running in {each.task_id for each in world.tasks.renewals})
    child = psutil.Process(world.slots[0].pid)

    assert await world.stop() < 3

    assert world.tasks.failed[running].returned
    assert not child.is_running()
    assert [task.task_id for task in world.tasks.queued] == [waiting]
    assert not world.left_behind()


async def test_a_stopping_worker_finishes_what_it_can(start: Start):
    world = await start(drain_seconds=10)
    task_id = world.do()
    await eventually(lambda: world.tasks.claims == 1)

    await world.stop()

    assert task_id in world.tasks.completed


async def test_what_a_killed_worker_left_is_removed_at_the_next_start(start: Start, tmp_path):
    leftover = tmp_path / "media-worker" / "media-worker-1" / "7" / "task" / "input"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"somebody's picture")

    await start()

    assert not leftover.exists()


async def test_a_process_does_not_grow_with_its_jobs(start: Start):
    world = await start()

    async def done(count: int) -> int:
        ids = [world.do(SHORT, "fil_coffee") for _ in range(count)]
        await eventually(lambda: set(ids) <= set(world.tasks.completed), within_seconds=60)
        return psutil.Process(world.slots[0].pid).memory_info().rss

    pid = world.slots[0].pid
    before = await done(20)
    began = time.monotonic()
    after = await done(200)

    assert world.slots[0].pid == pid
    assert after - before < 50 * 1024**2
    assert time.monotonic() - began < 60
