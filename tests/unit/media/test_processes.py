"""What is known to the processes in which other people's bytes are met, and what a worker says of itself."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import psutil
import pytest

from mesh.errors import MeshError, Unavailable
from services.media import domain, processes
from services.media.processes import Slot
from services.media.worker import cuda
from services.media.worker.capacity import capacity
from tests.eventually import eventually
from tests.hostile import saved, transparent
from tests.models import folder_with, grey, installed, worker_config
from tests.photographs import photograph

KNOWN = {
    "PATH", "PYTHONPATH", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "TMPDIR", "XDG_CACHE_HOME", "VIPS_WARNING",
    "LC_CTYPE",  # Python's own (PEP 538)
}  # fmt: skip


async def test_a_child_knows_nothing_of_its_workers_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATELIER_BROKER_URL", "amqp://worker:password@127.0.0.1")
    folder = folder_with(tmp_path / "weights", grey())

    async with processes.opened(worker_config(tmp_path, slots=1, weights_dir=folder)) as (slot,):
        await slot.start()
        child = psutil.Process(slot.pid)
        known = await eventually(lambda: "child" in " ".join(child.cmdline()) and child.environ())

    assert set(known) <= KNOWN
    assert "PATH" in known


def test_a_worker_says_what_it_can_do(tmp_path: Path) -> None:
    said = json.loads(capacity(worker_config(tmp_path, slots=3), [installed()]))

    assert said == {
        "slots": 3,
        "pools": ["cpu", "gpu"],
        "models": ["u2netp 1 (remove_background)"],
        "device": cuda.device() or "CPU",
    }
    assert json.loads(capacity(worker_config(tmp_path, slots=1), []))["pools"] == ["cpu"]


@pytest.mark.parametrize("format_", [domain.Format.JPEG, domain.Format.AVIF, domain.Format.WEBP])
@pytest.mark.parametrize("memory_mib", [148, 168, 208, 268])
async def test_an_encoder_that_gets_no_memory_is_no_bug(
    tmp_path: Path, format_: domain.Format, memory_mib: int
) -> None:
    slot = Slot(tmp_path, memory_bytes=memory_mib * 2**20, seconds=lambda: 60, turns=asyncio.Semaphore(1))
    slot.make_folder()
    larger = domain.Resize(width=3000, height=3000, fit=domain.Fit.FILL, format=format_)
    (tmp_path / "input").write_bytes(saved("PNG", transparent()))
    outcome = "done"

    try:
        await slot.run(larger, tmp_path / "input", {}, slot.folder, lambda _share: None)
    except MeshError as refusal:
        outcome = refusal.reason
    finally:
        await slot.stop()

    assert outcome in ("OUT_OF_MEMORY", "WORKER_CRASHED", "done")  # GLib ends a process that gets none for itself


@pytest.mark.parametrize(
    "work",
    [
        *(domain.Convert(format=format_) for format_ in domain.Format),  # written by libvips, but for a PDF
        domain.Compress(max_bytes=100_000),
        domain.Thumbnails(sizes=(domain.Resize(width=50),)),
    ],
    ids=lambda work: f"{type(work).__name__}-{getattr(work, 'format', None)}",
)
async def test_a_full_disk_is_no_bug(tmp_path: Path, work: domain.Work) -> None:
    async with processes.opened(worker_config(tmp_path, slots=1)) as (slot,):
        slot.make_folder()
        for format_ in domain.Format:
            domain.result_path(slot.folder, 0, format_).symlink_to("/dev/full")

        with pytest.raises(Unavailable) as refusal:
            await slot.run(work, photograph(), {}, slot.folder, lambda _share: None)

    assert refusal.value.reason == "STORAGE_FULL"


@pytest.fixture(params=["ImportError('libGL.so.1: cannot open shared object file')", "AttributeError('_ARRAY_API')"])
def _opencv_that_does_not_load(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cv2").mkdir()
    (tmp_path / "cv2" / "__init__.py").write_text(f"raise {request.param}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.usefixtures("_opencv_that_does_not_load")
async def test_opencv_that_does_not_load_is_no_face_detector() -> None:
    assert await processes.face_detector() == ""


async def test_opencv_that_loads_is_a_face_detector() -> None:
    assert (await processes.face_detector()).startswith("opencv-python-headless 4")


@pytest.mark.usefixtures("_opencv_that_does_not_load")
async def test_a_crop_by_faces_is_done_without_opencv_that_does_not_load(tmp_path: Path) -> None:
    by_faces = domain.SmartCrop(width=30, height=30, interest=domain.Interest.FACES)

    async with processes.opened(worker_config(tmp_path, slots=1)) as (slot,):
        slot.make_folder()
        (written,) = await slot.run(by_faces, photograph("coffee.png"), {}, slot.folder, lambda _share: None)

    assert (written.width, written.height) == (30, 30)
