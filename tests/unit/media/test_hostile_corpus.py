"""Every hostile file through every operation, in the process that does it in earnest, with its limits."""

from __future__ import annotations

import io
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pypdfium2
import pytest
from PIL import Image

from mesh.errors import MeshError
from services.media import domain, processes
from services.media.domain import Format, Interest, Written
from services.media.processes import Slot
from tests.hostile import SECRET, corpus
from tests.models import folder_with, grey, learned_upscale, worker_config
from tests.unit.media.conftest import EXAMPLES

pytestmark = pytest.mark.timeout(180)

MEMORY_BYTES = 400 * 1024 * 1024
SECONDS = 20
RESIDENT_BYTES = 300 * 1024 * 1024
MOST_SECONDS = 10.0

FILES = list(corpus())
WORKS = [
    *EXAMPLES,
    *(domain.Convert(format=each) for each in (Format.AVIF, Format.GIF, Format.PDF)),
    domain.SmartCrop(width=30, height=30, interest=Interest.FACES),
]


@pytest.fixture
async def slot(tmp_path: Path) -> AsyncIterator[Slot]:
    folder = folder_with(tmp_path / "weights", grey(), learned_upscale())
    config = worker_config(tmp_path, slots=1, job_memory_bytes=MEMORY_BYTES, job_seconds=SECONDS, weights_dir=folder)
    async with processes.opened(config) as (slot,):
        yield slot


def resident_bytes(pid: int) -> int:
    """Return the most that a process has had in memory at once."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def require_clean(result: Written) -> None:
    content = result.path.read_bytes()
    assert SECRET not in content
    if result.format is Format.PDF:
        assert len(pypdfium2.PdfDocument(content)) == 1
        return
    image = Image.open(io.BytesIO(content))
    image.load()
    assert (image.format, image.size) == (result.format.name, (result.width, result.height))
    told = {*image.info} - {"icc_profile", "jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi", "loop",
                            "duration", "timestamp", "background", "transparency", "version", "extension", "srgb",
                            "gamma", "chromaticity"}  # fmt: skip
    assert not told
    assert not dict(image.getexif())


@pytest.mark.parametrize("work", WORKS, ids=lambda each: f"{type(each).__name__}-{getattr(each, 'format', None)}")
async def test_every_file_is_refused_for_its_reason_or_done_right(slot, work):
    await slot.start()
    slot.make_folder()
    child = slot.pid
    wrong = []
    for file in FILES:
        source = slot.folder / "input"
        source.write_bytes(file.content)
        began = time.monotonic()
        try:
            results = await slot.run(work, source, {}, slot.folder, lambda _share: None)
        except MeshError as refusal:
            if refusal.reason not in file.refusals | MAY_REFUSE.get(type(work), frozenset()):
                wrong.append(f"{file.name}: {refusal.reason} {refusal.message}")
        else:
            if file.refusals:
                wrong.append(f"{file.name}: done")
            for result in results:
                try:
                    require_clean(result)
                except (AssertionError, OSError) as fault:
                    wrong.append(f"{file.name}: {fault!r}")
        if time.monotonic() - began > MOST_SECONDS:
            wrong.append(f"{file.name}: took {time.monotonic() - began:.1f} s")

    assert wrong == []
    assert slot.pid == child  # it never died
    assert resident_bytes(child) < RESIDENT_BYTES


# What an operation may refuse though the file is fine.
MAY_REFUSE = {domain.Optimise: frozenset({"ALREADY_SMALLEST", "TARGET_UNREACHABLE"})}
