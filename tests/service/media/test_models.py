"""The process that has the models, between real operations and a real ONNX Runtime."""

from __future__ import annotations

import asyncio
import io
import socket
import statistics
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from atelier.media.v1 import media_pb2
from PIL import Image

from scripts.local.layout import WEIGHTS
from services.media import processes
from services.media.worker import weights
from services.media.worker.inference import Inference, ItemsMalformed
from services.media.worker.models import RemoteModels, packed
from tests.eventually import eventually
from tests.models import SIDE_PX, described, folder_with, grey, learned_upscale, worker_config
from tests.service.media.conftest import SHORT, Start, World

CUT_OUT = media_pb2.Operation(remove_background=media_pb2.RemoveBackground(format=media_pb2.FORMAT_WEBP))
LARGER = media_pb2.Operation(upscale=media_pb2.Upscale(format=media_pb2.FORMAT_WEBP))


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with models that take no time."""
    return folder_with(tmp_path_factory.mktemp("models") / "weights", grey(), learned_upscale())


async def ended(world: World, *task_ids: str) -> None:
    def all_told() -> bool:
        return set(task_ids) <= world.tasks.completed.keys() | world.tasks.failed.keys()

    await eventually(all_told, within_seconds=60)


def models_of(world: World) -> psutil.Process:
    process = world.slots[0].inference.process
    assert process is not None
    return psutil.Process(process.pid)


async def test_a_background_is_removed_by_the_installed_weights(start: Start):
    world = await start(weights_dir=WEIGHTS)

    task_id = world.do(CUT_OUT, "fil_coffee")

    await ended(world, task_id)
    name, content_type, content = world.storage.results[f"may-{task_id}"]
    assert (name, content_type) == ("coffee-600x400.webp", "image/webp")
    result = Image.open(io.BytesIO(content))
    assert result.getpixel((590, 10))[3] < 10
    assert result.getpixel((300, 300))[3] > 245


async def test_an_image_is_made_larger(start: Start, quick: Path):
    world = await start(weights_dir=quick)

    task_id = world.do(LARGER)

    await ended(world, task_id)
    assert world.storage.results[f"may-{task_id}"][0] == "rocket-1280x854.webp"


async def test_a_worker_without_weights_takes_the_tasks_of_the_cpu_alone(start: Start):
    world = await start()
    await eventually(lambda: world.permits.queues)

    assert world.permits.queues == ["media.cpu"]


async def test_a_worker_with_weights_claims_from_both_pools(start: Start, quick: Path):
    world = await start(weights_dir=quick)
    await eventually(lambda: len(world.permits.queues) == 2)

    assert world.permits.queues == ["media.cpu", "media.gpu"]


async def test_a_worker_can_be_for_models_alone(start: Start, quick: Path):
    world = await start(weights_dir=quick, pools="gpu")
    await ended(world, world.do(CUT_OUT))

    assert set(world.tasks.pools) == {"gpu"}


async def test_an_operation_whose_model_is_missing_is_left_to_another_worker(start: Start):
    world = await start(weights_dir=WEIGHTS)

    task_id = world.do(LARGER)

    failure = await eventually(lambda: world.tasks.failed.get(task_id))
    assert (failure.error.reason, failure.transient) == ("MODEL_MISSING", True)


async def test_the_models_process_begins_when_it_is_wanted(start: Start, quick: Path):
    world = await start(weights_dir=quick)
    await ended(world, world.do(SHORT))
    assert world.slots[0].inference.process is None

    await ended(world, world.do(CUT_OUT))

    assert models_of(world).nice() > psutil.Process().nice()


async def test_a_crash_of_the_models_costs_one_attempt_and_the_next_task_is_fine(start: Start, quick: Path):
    world = await start(weights_dir=quick)
    await ended(world, world.do(CUT_OUT))
    models_of(world).suspend()
    task_id = world.do(CUT_OUT)
    await eventually(lambda: any(each.task_id == task_id for each in world.tasks.renewals))

    models_of(world).kill()

    failure = await eventually(lambda: world.tasks.failed.get(task_id))
    assert (failure.error.reason, failure.transient) == ("WORKER_CRASHED", True)
    after = world.do(CUT_OUT)
    await ended(world, after)
    assert after in world.tasks.completed


async def test_a_cancelled_task_does_not_take_those_with_it_that_are_computed_together(start: Start, quick: Path):
    world = await start(slots=2, weights_dir=quick)
    await ended(world, world.do(CUT_OUT))
    models_of(world).suspend()
    gone, kept = world.do(CUT_OUT), world.do(CUT_OUT)
    await eventually(lambda: {gone, kept} <= {each.task_id for each in world.tasks.renewals})
    world.tasks.lost.add(gone)
    await eventually(lambda: f"may-{gone}" in world.storage.discarded)

    models_of(world).resume()

    await ended(world, kept)
    assert kept in world.tasks.completed
    assert gone not in world.tasks.completed


async def test_weights_that_were_changed_under_a_worker_fail_typed(start: Start, tmp_path: Path):
    folder = folder_with(tmp_path / "weights", grey())
    (folder / "grey.onnx").write_bytes(b"something else")
    world = await start(weights_dir=folder)

    task_id = world.do(CUT_OUT)

    failure = await eventually(lambda: world.tasks.failed.get(task_id))
    assert (failure.error.reason, failure.transient) == ("MODEL_UNUSABLE", True)


async def test_r25_out_of_memory_is_typed_and_the_next_task_is_fine(start: Start, tmp_path: Path):
    folder = folder_with(tmp_path / "weights", learned_upscale())
    # u2netp needs some 350 MiB, which the kernel refuses; the other model needs next to nothing.
    world = await start(weights_dir=folder, model_memory_bytes=240 * 1024**2)
    before = world.do(LARGER)
    await ended(world, before)
    first = models_of(world)
    assert first.rlimit(psutil.RLIMIT_DATA)[0] == 240 * 1024**2

    task_id = world.do(CUT_OUT)

    failure = await eventually(lambda: world.tasks.failed.get(task_id), within_seconds=20)
    assert (failure.error.reason, failure.transient) == ("OUT_OF_MEMORY", True)
    await eventually(lambda: not first.is_running())
    after = world.do(LARGER)
    await ended(world, after)
    assert {before, after} <= set(world.tasks.completed)


async def test_r26_the_models_process_does_not_grow(tmp_path: Path, quick: Path):
    async with processes.opened(worker_config(tmp_path, slots=1, weights_dir=quick)) as (slot,):
        models = RemoteModels(slot.inference.address, weights.described(quick))
        item = np.zeros((4, 3, SIDE_PX, SIDE_PX), np.float32)

        async def resident_after(count: int) -> int:
            for _ in range(count):
                await asyncio.to_thread(models.run, models.model("upscale"), item)
            assert slot.inference.process is not None
            return psutil.Process(slot.inference.process.pid).memory_info().rss

        await resident_after(75)
        sizes = [await resident_after(25) for _ in range(8)]

    # A step is 100 items, each of 48 KiB in and 192 KiB out; the allocator's own coming and going is a MiB.
    assert statistics.linear_regression(range(8), sizes).slope < 1024**2


async def test_a_process_that_has_computed_enough_is_replaced_and_nobody_notices(tmp_path: Path, quick: Path):
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"\0{tmp_path.name}")
    listening.listen()
    listening.setblocking(False)
    models = RemoteModels(tmp_path.name, weights.described(quick))
    item = np.ones((1, 3, SIDE_PX, SIDE_PX), np.float32)

    def inference() -> Inference:
        limits = {"memory_bytes": 8 * 1024**3, "batch": 4, "batch_seconds": 0.0, "compute_seconds": 10.0}
        return Inference(quick, **limits, items=3)

    first = asyncio.create_task(inference().run(listening))
    for _ in range(3):
        await asyncio.to_thread(models.run, models.model("upscale"), item)
    async with asyncio.timeout(5):
        await first
    waiting = asyncio.create_task(asyncio.to_thread(models.run, models.model("upscale"), item))
    second = asyncio.create_task(inference().run(listening))

    assert (await waiting).shape == (1, 3, 2 * SIDE_PX, 2 * SIDE_PX)
    second.cancel()
    listening.close()


@pytest.mark.parametrize("count", [2, 3, 4])
async def test_the_last_answer_of_a_process_is_whole_though_it_is_read_slowly(tmp_path: Path, quick: Path, count: int):
    address = f"\0{tmp_path.name}"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    listening.setblocking(False)
    limits = {"memory_bytes": 8 * 1024**3, "batch": 8, "batch_seconds": 0.0, "compute_seconds": 10.0}
    # With an event loop of its own, which ends with it as a process' does.
    process = asyncio.create_task(asyncio.to_thread(asyncio.run, Inference(quick, **limits, items=1).run(listening)))

    def asked() -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(address)
            for part in packed({"model": "linear"}, np.ones((count, 3, SIDE_PX, SIDE_PX), np.float32)):
                connection.sendall(part)
            answer = b""
            while piece := connection.recv(2048):
                answer += piece
                time.sleep(0.0005)
            return answer

    answer = await asyncio.to_thread(asked)
    await process
    listening.close()
    assert len(answer) > 4 * count * 3 * (2 * SIDE_PX) ** 2


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 1)])
async def test_what_is_no_item_of_the_model_is_refused(tmp_path: Path, quick: Path, shape: tuple[int, ...]):
    async with processes.opened(worker_config(tmp_path, slots=1, weights_dir=quick)) as (slot,):
        models = RemoteModels(slot.inference.address, weights.described(quick))

        with pytest.raises(ItemsMalformed.__base__) as refusal:
            await asyncio.to_thread(models.run, models.model("upscale"), np.zeros(shape, np.float32))

    assert refusal.value.reason == "ITEMS_MALFORMED"


async def test_memory_bounds_the_batch(quick: Path, caplog: pytest.LogCaptureFixture):
    heavy, content = described("heavy", "upscale", learned_upscale()[1], item_bytes=1024**3)
    assert heavy.item_bytes * 3 < 16 * 1024**3
    inference = Inference(quick, memory_bytes=16 * 1024**3, batch=64, batch_seconds=0.0, compute_seconds=10.0)
    inference._taken_bytes = lambda: 12 * 1024**3
    inference._load = lambda _model: None

    batches = await inference._batches(heavy)

    assert batches.at_most == 4
    assert content
