import asyncio
import hashlib
import resource
import tracemalloc

import pytest

from services.storage.blobs import FolderBlobs
from services.storage.domain import FileNotFound, FileTooLarge, StorageFull
from tests.service.storage.world import age_files

MIB = 1024 * 1024


async def chunks(*parts: bytes):
    for part in parts:
        yield part


async def zeros(size_bytes: int):
    for _ in range(size_bytes // 65536):
        yield bytes(65536)


async def kept(blobs: FolderBlobs, *parts: bytes) -> str:
    async with blobs.received(chunks(*parts), MIB) as incoming:
        await blobs.keep(incoming)
        return incoming.sha256


async def read(blobs: FolderBlobs, sha256: str, start: int, stop: int) -> bytes:
    return b"".join([chunk async for chunk in await blobs.read(sha256, start, stop)])


def names(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


async def test_bytes_lie_under_their_own_hash_and_come_back(tmp_path):
    blobs = FolderBlobs(tmp_path)

    sha256 = await kept(blobs, b"hel", b"lo")

    assert sha256 == hashlib.sha256(b"hello").hexdigest()
    assert names(tmp_path) == {f"{sha256[:2]}/{sha256[2:]}"}
    assert await read(blobs, sha256, 0, 5) == b"hello"
    assert await read(blobs, sha256, 1, 3) == b"el"


async def test_equal_bytes_are_stored_once(tmp_path):
    blobs = FolderBlobs(tmp_path)

    first, second = await asyncio.gather(kept(blobs, b"hello"), kept(blobs, b"hel", b"lo"))

    assert first == second
    assert len(names(tmp_path)) == 1


async def test_bytes_that_are_not_kept_are_gone(tmp_path):
    async with FolderBlobs(tmp_path).received(chunks(b"hello"), MIB) as incoming:
        assert incoming.head == b"hello"

    assert names(tmp_path) == set()


async def test_an_endless_body_is_refused_at_the_limit_in_bounded_memory(tmp_path):
    blobs = FolderBlobs(tmp_path)
    tracemalloc.start()

    with pytest.raises(FileTooLarge) as refusal:
        async with blobs.received(zeros(1024 * MIB), 32 * MIB):
            pass

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refusal.value.metadata == {"limit_bytes": str(32 * MIB)}
    assert peak < 4 * MIB
    assert names(tmp_path) == set()


async def test_a_short_body_is_refused_at_the_limit_too(tmp_path):
    blobs = FolderBlobs(tmp_path)

    with pytest.raises(FileTooLarge) as refusal:
        async with blobs.received(chunks(b"hel", b"lo"), 4):
            pass

    assert refusal.value.metadata == {"limit_bytes": "4"}
    assert names(tmp_path) == set()


async def test_an_upload_that_is_cancelled_leaves_nothing(tmp_path):
    blobs = FolderBlobs(tmp_path)
    arrived = asyncio.Event()

    async def stuck():
        yield bytes(MIB)
        arrived.set()
        await asyncio.Event().wait()

    async def upload():
        async with blobs.received(stuck(), 2 * MIB):
            pass

    task = asyncio.create_task(upload())
    await arrived.wait()
    task.cancel()
    await asyncio.wait({task})

    assert names(tmp_path) == set()


@pytest.fixture
def room_for_64_kib():
    """A real refusal of the system: no file may grow beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_no_room_on_the_disk_is_told_and_leaves_nothing(tmp_path, room_for_64_kib):
    blobs = FolderBlobs(tmp_path)

    with pytest.raises(StorageFull) as refusal:
        async with blobs.received(zeros(MIB), 2 * MIB):
            pass

    assert (refusal.value.code, refusal.value.reason) == ("UNAVAILABLE", "STORAGE_FULL")
    assert refusal.value.metadata == {"errno": "EFBIG"}
    assert names(tmp_path) == set()


async def test_what_is_open_stays_readable_when_it_is_removed(tmp_path):
    blobs = FolderBlobs(tmp_path)
    sha256 = await kept(blobs, b"hello")
    opened = await blobs.read(sha256, 0, 5)

    await blobs.remove(sha256)

    assert b"".join([chunk async for chunk in opened]) == b"hello"
    assert names(tmp_path) == set()


async def test_bytes_that_are_not_there_are_not_found(tmp_path):
    with pytest.raises(FileNotFound) as refusal:
        await FolderBlobs(tmp_path).read("0" * 64, 0, 1)

    assert refusal.value.metadata == {"sha256": "0" * 64}


async def test_bytes_that_a_disk_lost_are_no_shorter_file(tmp_path):
    blobs = FolderBlobs(tmp_path)
    sha256 = await kept(blobs, b"hel")

    with pytest.raises(EOFError):
        await read(blobs, sha256, 0, 5)


async def test_what_a_killed_upload_left_is_removed_and_a_live_one_is_not(tmp_path):
    blobs = FolderBlobs(tmp_path)
    (tmp_path / "incoming" / "dead").write_bytes(b"hel")
    age_files(tmp_path)

    async with blobs.received(chunks(b"hello"), MIB) as incoming:
        await blobs.remove_leftovers(3600)
        await blobs.keep(incoming)

    assert names(tmp_path) == {f"{incoming.sha256[:2]}/{incoming.sha256[2:]}"}


async def test_old_contents_are_listed_by_prefix(tmp_path):
    blobs = FolderBlobs(tmp_path)
    old = await kept(blobs, b"old")
    age_files(tmp_path)
    await kept(blobs, b"young")

    assert [found async for found in blobs.older_than(3600)] == [(old[:2], [old])]


async def test_contents_of_the_first_and_the_last_prefix_are_listed(tmp_path):
    blobs = FolderBlobs(tmp_path)
    for prefix in ("00", "ff"):
        (tmp_path / prefix).mkdir()
        (tmp_path / prefix / "1").write_bytes(b"old")
    age_files(tmp_path)

    assert [found async for found in blobs.older_than(3600)] == [("00", ["001"]), ("ff", ["ff1"])]
