"""Real photographs, and what people's cameras, programs and enemies make of them."""

from __future__ import annotations

import ctypes
import importlib.util
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from services.media import domain, operations
from services.media.operations import models
from tests.models import Here

# One of each operation: those that need nothing said, and these.
REQUIRING = [
    domain.Resize(width=50),
    domain.SmartCrop(width=30, height=30),
    domain.Watermark(text=domain.Text(content="©")),
    domain.Compress(max_bytes=100_000),
    domain.Optimise(format=domain.Format.JPEG),
    domain.Thumbnails(sizes=(domain.Resize(width=40), domain.Resize(width=20, format=domain.Format.WEBP))),
    domain.Pipeline(
        steps=(
            domain.Step(resize=domain.Resize(width=50)),
            domain.Step(watermark=domain.Watermark(text=domain.Text(content="©"))),
        ),
        convert=domain.Convert(format=domain.Format.WEBP),
    ),
]
EXAMPLES = [*REQUIRING, *(kind() for kind in domain.OPERATIONS if kind not in map(type, REQUIRING))]


@pytest.fixture(scope="session")
def here() -> Here:
    return Here()


@pytest.fixture(autouse=True)
def _models(here: Here) -> Iterator[None]:
    """Have operations find models, run in this process."""
    models.use(here)
    yield
    models.use(models.NONE)


@pytest.fixture(scope="session")
def photos() -> Path:
    package = importlib.util.find_spec("skimage")  # found, not imported: only its pictures are installed
    assert package is not None
    assert package.submodule_search_locations is not None
    return Path(package.submodule_search_locations[0]) / "data"


@pytest.fixture
def rocket(photos: Path) -> Path:
    return photos / "rocket.jpg"  # 640 × 427, RGB


@pytest.fixture
def coffee(photos: Path) -> Path:
    return photos / "coffee.png"  # 600 × 400, RGB


IN_CLOSE_NOWRITE, IN_OPEN, INOTIFY_EVENT_BYTES = 0x10, 0x20, 16

Run = Callable[..., tuple[Image.Image, domain.Written]]
RunAll = Callable[..., list[tuple[Image.Image, domain.Written]]]


@pytest.fixture
def run_all(tmp_path: Path) -> RunAll:
    """Do an operation and open everything that it wrote."""

    def done(
        work: domain.Work, source: Path, files: dict[str, Path] | None = None
    ) -> list[tuple[Image.Image, domain.Written]]:
        results = operations.run(work, source, files or {}, tmp_path, lambda _share: None)
        return [(Image.open(io.BytesIO(written.path.read_bytes())), written) for written in results]

    return done


@pytest.fixture
def run(run_all: RunAll) -> Run:
    """Do an operation and open what it wrote."""

    def done(
        work: domain.Work, source: Path, files: dict[str, Path] | None = None
    ) -> tuple[Image.Image, domain.Written]:
        (result,) = run_all(work, source, files)
        return result

    return done


def opened_and_closed(path: Path, work: Callable[[], object]) -> int:
    """Return how often a file is opened and closed during some work, as the kernel tells (inotify(7))."""
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    try:
        assert libc.inotify_add_watch(watch, os.fsencode(path), IN_CLOSE_NOWRITE | IN_OPEN) > 0
        work()
        return len(os.read(watch, 65536)) // INOTIFY_EVENT_BYTES
    finally:
        os.close(watch)


def huge_png(path: Path, side: int) -> Path:
    """Write a PNG of some hundred bytes which claims to be `side` × `side`."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )
    return path


def near(colour: object, other: object, within: int = 12) -> bool:
    assert isinstance(colour, tuple)
    assert isinstance(other, tuple)
    return all(abs(a - b) <= within for a, b in zip(colour[:3], other[:3], strict=True))
