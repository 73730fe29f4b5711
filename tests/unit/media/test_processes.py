"""What is known to the processes in which other people's bytes are met, and what a worker says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from services.media import processes
from services.media.worker import cuda
from services.media.worker.capacity import capacity
from tests.eventually import eventually
from tests.models import folder_with, grey, installed, worker_config

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
