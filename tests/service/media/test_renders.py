"""Renders on real listeners and in real child processes, of files that a real storage service keeps."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
from atelier.media.v1.media_pb2 import RenderFileRequest
from atelier.media.v1.media_pb2_grpc import MediaServiceStub, add_MediaServiceServicer_to_server
from atelier.storage.v1 import storage_pb2
from atelier.storage.v1.storage_pb2_grpc import StorageServiceStub
from PIL import Image

from mesh import urls
from mesh.channel import MeshChannel
from mesh.errors import Unavailable
from services.media import peers, processes
from services.media.cache import FolderCache, Rendering
from services.media.config import Config
from services.media.handlers import MediaService
from services.media.http import RenderEndpoint
from services.media.renders import Renders
from tests import mesh_server
from tests.authority import leaf
from tests.databases import SqliteDatabases
from tests.eventually import eventually
from tests.photographs import photograph
from tests.service.media.conftest import Addresses
from tests.service.storage.world import World, opened
from tests.slow_image import slow_image

MIB = 1024**2


class Gallery:
    """One media service, and the storage behind it."""

    def __init__(self, files: World, folder: Path) -> None:
        self.files = files
        self.folder = folder
        self.server: mesh_server.Server
        self.cache: FolderCache
        self.renders: Renders
        self.slots: Sequence[processes.Slot] = []
        self._stack = AsyncExitStack()

    async def start(self, *, at_once: int = 64, wait_seconds: float = 5.0, **settings: int) -> None:
        await self._stack.aclose()
        config = Config.model_validate(
            {
                "ATELIER_CONSUL_URL": "", "ATELIER_BROKER_URL": "", "ATELIER_CONTROL_ADDRESSES": "",
                "ATELIER_DATA_DIR": self.folder, "ATELIER_SECRETS_DIR": self.folder, "ATELIER_INSTANCE": "media-1",
                "slots": 1, **settings,
            }
        )  # fmt: skip
        hold = self._stack.enter_async_context
        storage = self.files.server
        contents = await hold(
            peers.opened(Addresses(storage.http_url.removeprefix("https://")), storage.tls(caller="media"))
        )
        self.slots = await hold(processes.opened(config))
        channel = storage.bare(caller="media")
        self._stack.push_async_callback(channel.close)
        originals = peers.MeshOriginals(StorageServiceStub(MeshChannel(channel)), contents)
        self.cache = FolderCache(self.folder / "renders", config.cache_bytes)
        self.renders = Renders(originals, self.slots, self.cache, at_once=at_once, wait_seconds=wait_seconds)
        self.server = await hold(
            mesh_server.serving(
                partial(add_MediaServiceServicer_to_server, MediaService({})),
                http=RenderEndpoint(originals, self.renders).by_rpc(),
                service_name="media",
            )
        )

    async def stop(self) -> None:
        await self._stack.aclose()

    @property
    def jobs(self) -> int:
        """How often a child was given work."""
        return sum(slot._jobs for slot in self.slots)

    def kept(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "renders").iterdir())

    async def put(self, content: bytes | None = None, name: str = "rocket.jpg", user: str = "usr_ann") -> str:
        answer = await self.files.upload(photograph().read_bytes() if content is None else content, name, user)
        return answer.json()["fileId"]

    async def get(self, file_id: str, user: str | None = "usr_ann", verb: str = "GET", **asked) -> httpx.Response:
        headers = asked.pop("headers", {})
        async with httpx.AsyncClient(
            base_url=self.server.http_url, verify=leaf("edge").tls_client("media"), timeout=60
        ) as http:
            return await http.request(
                verb,
                f"/api/v1/files/{file_id}/render",
                params=asked,
                headers={**mesh_server.headers(user), "accept": "*/*", **headers},
            )


def reason(refusal: httpx.Response) -> tuple[int, str]:
    return refusal.status_code, refusal.json()["details"][0]["reason"]


def picture(answer: httpx.Response) -> tuple[str, tuple[int, int]]:
    assert answer.status_code == 200, answer.text
    image = Image.open(io.BytesIO(answer.content))
    image.load()
    return str(image.format), image.size


Start = Callable[..., Awaitable[Gallery]]


@pytest.fixture
async def start(tmp_path: Path, sqlite_databases: SqliteDatabases) -> AsyncIterator[Start]:
    async with opened(tmp_path, await sqlite_databases.new("storage", tmp_path)) as files:
        files.users.limit = 100 * MIB
        gallery = Gallery(files, tmp_path / "media")

        async def started(**settings) -> Gallery:
            await gallery.start(**settings)
            return gallery

        yield started
        await gallery.stop()


async def test_a_render_is_made_once_and_then_served_from_disk(start: Start):
    gallery = await start()
    file_id = await gallery.put()

    cold = await gallery.get(file_id, width="320", fit="fill", height="200", format="webp", quality="70")
    warm = await gallery.get(file_id, width="320", fit="FIT_FILL", height="200", format="FORMAT_WEBP", quality="70")

    assert picture(cold) == ("WEBP", (320, 200))
    assert (warm.content, warm.headers["etag"], gallery.jobs) == (cold.content, cold.headers["etag"], 1)
    assert cold.headers["content-type"] == "image/webp"
    assert cold.headers["cache-control"] == "private, no-cache"
    assert cold.headers["content-length"] == str(len(cold.content))
    assert cold.headers["x-content-type-options"] == "nosniff"
    assert "vary" not in cold.headers


async def test_what_differs_has_another_etag_and_a_default_said_has_not(start: Start):
    gallery = await start()
    file_id = await gallery.put()

    plain, said, other = [
        (await gallery.get(file_id, width="64", **asked)).headers["etag"]
        for asked in ({}, {"fit": "inside", "quality": "80", "format": "jpeg"}, {"quality": "81"})
    ]

    assert plain == said != other
    assert gallery.jobs == 2


async def test_without_a_size_no_side_is_longer_than_the_bound(start: Start):
    gallery = await start()
    wide = io.BytesIO()
    Image.new("RGB", (5000, 10)).save(wide, "PNG")

    answer = await gallery.get(await gallery.put(wide.getvalue(), "wide.png"))

    assert picture(answer) == ("PNG", (4096, 8))


async def test_of_an_animation_the_first_frame_is_shown(start: Start):
    gallery, animation = await start(), io.BytesIO()
    red, blue = Image.new("RGB", (80, 60), (200, 0, 0)), Image.new("RGB", (80, 60), (0, 0, 200))
    red.save(animation, "GIF", save_all=True, append_images=[blue], duration=100)
    file_id = await gallery.put(animation.getvalue(), "moving.gif")

    answers = [await gallery.get(file_id, width=40, format=format_) for format_ in ("gif", "webp")]

    for answer in answers:
        assert picture(answer)[1] == (40, 30)
        shown = Image.open(io.BytesIO(answer.content))
        assert getattr(shown, "n_frames", 1) == 1
        assert shown.convert("RGB").getpixel((20, 15))[0] > 150


async def test_one_side_filled_keeps_the_ratio(start: Start):
    gallery = await start()

    answer = await gallery.get(await gallery.put(), width="800", fit="fill")

    assert picture(answer) == ("JPEG", (800, 534))


async def test_what_a_browser_has_is_not_sent_again_nor_made(start: Start):
    gallery = await start()
    file_id = await gallery.put()
    etag = (await gallery.get(file_id, width="64")).headers["etag"]
    shutil.rmtree(gallery.folder / "renders")

    same = await gallery.get(file_id, width="64", headers={"if-none-match": f'"other", W/{etag}'})

    assert (same.status_code, same.content, same.headers["etag"], gallery.jobs) == (304, b"", etag, 1)
    assert same.headers["cache-control"] == "private, no-cache"


@pytest.mark.parametrize(
    ("accept", "format_"),
    [
        ("image/avif,image/webp,image/apng,*/*;q=0.8", "AVIF"),
        ("image/webp, image/avif;q=0.5", "WEBP"),
        ("image/avif;q=0, image/webp;q=nonsense, */*", "JPEG"),
        ("image/*", "JPEG"),
    ],
)
async def test_without_a_format_the_browser_is_asked(start: Start, accept: str, format_: str):
    gallery = await start()

    answer = await gallery.get(await gallery.put(), width="64", headers={"accept": accept})

    assert picture(answer)[0] == format_
    assert answer.headers["vary"] == "accept"


async def test_head_answers_what_get_would_without_the_body(start: Start):
    gallery = await start()
    file_id = await gallery.put()

    head = await gallery.get(file_id, verb="HEAD", width="64")
    whole = await gallery.get(file_id, width="64")

    assert (head.status_code, head.content) == (200, b"")
    assert (head.headers["content-length"], head.headers["etag"]) == (str(len(whole.content)), whole.headers["etag"])


async def test_a_hundred_at_once_decode_once(start: Start):
    gallery = await start(slots=2)
    file_id = await gallery.put()

    answers = await asyncio.gather(*(gallery.get(file_id, width="320") for _ in range(100)))

    assert {answer.content for answer in answers} == {answers[0].content}
    assert picture(answers[0]) == ("JPEG", (320, 214))
    assert gallery.jobs == 1


async def test_at_the_bound_those_that_were_not_asked_for_longest_go_first(start: Start):
    gallery = await start()
    file_id = await gallery.put()
    first = len((await gallery.get(file_id, width="100")).content)
    second = len((await gallery.get(file_id, width="101")).content)
    await gallery.start(cache_bytes=first + second)
    await gallery.get(file_id, width="100")  # asked for again, so that the other is the older one

    third = await gallery.get(file_id, width="60")
    await gallery.get(file_id, width="100")
    again_at = gallery.jobs
    await gallery.get(file_id, width="101")

    assert picture(third)[1][0] == 60
    assert (again_at, gallery.jobs) == (1, 2)
    assert gallery.cache.size_bytes == sum(path.stat().st_size for path in (gallery.folder / "renders").iterdir())
    assert gallery.cache.size_bytes <= first + second


async def test_a_render_larger_than_the_cache_is_served_and_not_kept(start: Start):
    gallery = await start(cache_bytes=3000)
    file_id = await gallery.put()
    small = await gallery.get(file_id, width="16")

    large = await gallery.get(file_id, width="640")

    assert len(large.content) > 3000 > len(small.content)
    assert len(gallery.kept()) == 1  # nor did it drive out what is


async def test_a_cache_that_cannot_be_written_fails_nobody(start: Start):
    gallery = await start()
    file_id = await gallery.put()
    shutil.rmtree(gallery.folder / "renders")
    (gallery.folder / "renders").write_bytes(b"")  # the disk's own refusal

    answer = await gallery.get(file_id, width="64")

    assert picture(answer)[1][0] == 64


async def test_a_full_disk_gets_its_room_back_from_the_cache(start: Start, tmp_path: Path):
    gallery = await start()
    file_id = await gallery.put()
    await gallery.get(file_id, width="64")

    await gallery.cache.leave_free(shutil.disk_usage(tmp_path).free + 1024 * 1024 * MIB)

    assert gallery.kept() == []
    assert picture(await gallery.get(file_id, width="64"))[1][0] == 64


async def test_a_restart_keeps_what_was_made_in_its_order(start: Start):
    gallery = await start()
    file_id = await gallery.put()
    before = [(await gallery.get(file_id, width=width)).content for width in ("64", "65")]
    await gallery.get(file_id, width="64")
    await gallery.stop()

    await gallery.start()

    assert [(await gallery.get(file_id, width=width)).content for width in ("64", "65")] == before
    assert gallery.jobs == 0
    await gallery.get(file_id, width="64")
    await gallery.start(cache_bytes=max(map(len, before)))
    await gallery.get(file_id, width="64")
    assert (gallery.jobs, len(gallery.kept())) == (0, 1)  # the other one went


async def test_a_child_killed_in_its_work_leaves_nothing_and_the_next_request_is_served(start: Start):
    gallery = await start()
    file_id = await gallery.put(slow_image(), "slow.avif")
    asking = asyncio.create_task(gallery.get(file_id, width="64"))
    await eventually(lambda: psutil.Process(gallery.slots[0].pid).cpu_times().user > 1 and gallery.jobs == 1, 30)

    os.kill(gallery.slots[0].pid, signal.SIGKILL)

    assert reason(await asking) == (503, "WORKER_CRASHED")
    assert gallery.kept() == []
    assert picture(await gallery.get(await gallery.put(), width="64"))[1][0] == 64


async def test_beyond_its_bound_it_refuses_at_once_and_says_when_to_come_again(start: Start):
    gallery = await start(at_once=2, wait_seconds=60)
    slow, quick = await gallery.put(slow_image(), "slow.avif"), await gallery.put()
    busy = [asyncio.create_task(gallery.get(slow, width=width)) for width in ("64", "65")]
    await eventually(lambda: len(gallery.renders._flights) == 2)

    refusals = await asyncio.gather(*(gallery.get(quick, width=str(width)) for width in range(100, 120)))

    assert {reason(each) for each in refusals} == {(429, "RENDER_BUSY")}
    assert {each.headers["retry-after"] for each in refusals} == {"1"}
    assert len(gallery.kept()) == 0
    for each in busy:
        each.cancel()
    await asyncio.wait(busy)
    await eventually(lambda: not gallery.renders._flights)
    assert picture(await gallery.get(quick, width="64"))[1][0] == 64


async def test_who_waits_too_long_for_a_slot_is_told_to_come_again(start: Start):
    gallery = await start(wait_seconds=0.3)
    slow = await gallery.put(slow_image(), "slow.avif")
    busy = asyncio.create_task(gallery.get(slow, width="64"))
    await eventually(gallery.renders._free.empty)

    refusal = await gallery.get(await gallery.put(), width="64")

    assert reason(refusal) == (429, "RENDER_BUSY")
    busy.cancel()


async def test_work_that_nobody_waits_for_any_more_is_given_up(start: Start):
    gallery = await start()
    slow = await gallery.put(slow_image(), "slow.avif")
    asking = [asyncio.create_task(gallery.get(slow, width="64")) for _ in range(2)]
    await eventually(lambda: [each.waiting for each in gallery.renders._flights.values()] == [2])
    await eventually(lambda: gallery.jobs == 1)
    child = psutil.Process(gallery.slots[0].pid)

    for each in asking:
        each.cancel()

    await eventually(lambda: not child.is_running())
    await eventually(lambda: not gallery.renders._free.empty())


@pytest.mark.parametrize("content", [b"not an image", b"\xff\xd8\xff\xe0 no more", b"<svg xmlns='x'/>"])
async def test_what_is_no_picture_is_refused_and_not_kept(start: Start, content: bytes):
    gallery = await start()

    refusal = await gallery.get(await gallery.put(content, "a"), width="64")

    assert refusal.status_code == 400
    assert reason(refusal)[1] in {"INPUT_UNSUPPORTED", "INPUT_DAMAGED"}
    assert gallery.kept() == []


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"width": "4097"}, "FIELD_OUT_OF_RANGE"),
        ({"height": "0"}, "FIELD_OUT_OF_RANGE"),
        ({"width": "many"}, "QUERY_MALFORMED"),
        ({"width": ["1", "2"]}, "QUERY_MALFORMED"),
        ({"format": "bmp"}, "QUERY_MALFORMED"),
        ({"fileId": "fil_other"}, "QUERY_MALFORMED"),
        ({"blur": "1"}, "QUERY_MALFORMED"),
    ],
)
async def test_a_query_that_makes_no_sense_is_refused(start: Start, asked, expected: str):
    gallery = await start()

    assert reason(await gallery.get("fil_any", **asked)) == (400, expected)


async def test_another_s_file_is_the_same_404_as_none_though_the_same_picture_is_at_hand(start: Start):
    gallery = await start()
    own = await gallery.put()
    await gallery.get(own, width="64")

    anothers = await gallery.get(own, user="usr_bob", width="64")
    none = await gallery.get("fil_none", user="usr_bob", width="64")

    assert reason(anothers) == reason(none) == (404, "FILE_NOT_FOUND")
    assert anothers.json()["message"].replace(own, "") == none.json()["message"].replace("fil_none", "")
    assert reason(await gallery.get(own, user=None, width="64"))[0] == 401


async def test_a_signed_url_shows_what_it_is_of_to_whoever_has_it_until_it_expires(start: Start):
    gallery = await start()
    file_id = await gallery.put()
    sign = storage_pb2.SignFileUrlRequest(file_id=file_id, render="width=64&format=webp")
    url = (await gallery.files.stub().SignFileUrl(sign)).url
    old = urls.signed(mesh_server.URL_KEY, "usr_ann", url.partition("&signature=")[0], datetime(2026, 1, 1, tzinfo=UTC))

    async def asked(url: str) -> httpx.Response:
        tls = leaf("edge").tls_client("media")
        async with httpx.AsyncClient(base_url=gallery.server.http_url, verify=tls, timeout=60) as http:
            return await http.get(url)

    shown = await asked(url)
    changed = await asked(url.replace("width=64", "width=65"))
    expired = await asked(old)
    await gallery.files.stub().DeleteFile(storage_pb2.DeleteFileRequest(file_id=file_id))
    gone = await asked(url)

    assert (picture(shown), gallery.jobs) == (("WEBP", (64, 43)), 1)
    assert (reason(changed), reason(expired)) == ((403, "URL_INVALID"), (403, "URL_EXPIRED"))
    assert reason(gone) == (404, "FILE_NOT_FOUND")


async def test_equal_files_of_two_people_are_made_once_and_each_asks_for_their_own(start: Start):
    gallery = await start()
    hers, his = await gallery.put(), await gallery.put(user="usr_bob")

    first = await gallery.get(hers, width="64")
    second = await gallery.get(his, user="usr_bob", width="64")

    assert (second.content, gallery.jobs) == (first.content, 1)


async def test_of_a_deleted_file_nothing_is_served_and_soon_nothing_is_left(start: Start):
    gallery = await start()
    hers, his = await gallery.put(), await gallery.put(user="usr_bob")
    etag = (await gallery.get(hers, width="64")).headers["etag"]
    delete = storage_pb2.DeleteFileRequest

    await gallery.files.stub().DeleteFile(delete(file_id=hers))
    refusal = await gallery.get(hers, width="64", headers={"if-none-match": etag})
    await gallery.renders.forget_deleted()
    while_one_has_it = len(gallery.kept())
    await gallery.files.stub("usr_bob").DeleteFile(delete(file_id=his))
    await gallery.renders.forget_deleted()

    assert reason(refusal) == (404, "FILE_NOT_FOUND")
    assert (while_one_has_it, gallery.kept(), gallery.cache.size_bytes) == (1, [], 0)


async def test_while_storage_is_away_nothing_is_taken_for_deleted(start: Start):
    gallery = await start()
    await gallery.get(await gallery.put(), width="64")
    await gallery.files.server._stack.aclose()

    with pytest.raises(Unavailable):
        await gallery.renders.forget_deleted()

    assert len(gallery.kept()) == 1


async def test_what_is_open_stays_readable_when_it_is_evicted(tmp_path: Path):
    cache = FolderCache(tmp_path / "cache", 3 * MIB)
    content = os.urandom(2 * MIB)
    (tmp_path / "made").write_bytes(content)
    rendering: Rendering = await cache.keep("a-1", tmp_path / "made")
    head = rendering.head()

    cache.forget(["a"])

    assert b"".join([chunk async for chunk in rendering.rest(head)]) == content
    assert list((tmp_path / "cache").iterdir()) == []


async def test_what_is_given_up_while_it_is_kept_is_counted_or_not_there(tmp_path: Path):
    cache = FolderCache(tmp_path / "cache", 100 * MIB)

    for number in range(20):  # at as many moments
        made = tmp_path / f"made-{number}"
        made.write_bytes(os.urandom(MIB))
        keeping = asyncio.create_task(cache.keep(f"a-{number}", made))
        await asyncio.sleep(number * 0.0005)
        keeping.cancel()
        await asyncio.wait([keeping])
    await asyncio.get_running_loop().shutdown_default_executor()

    assert cache.size_bytes == sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())


async def test_it_is_served_over_http_alone(start: Start):
    gallery = await start()

    with pytest.raises(Exception, match="over HTTP") as refusal:
        await MediaServiceStub(gallery.server.channel(user="usr_ann")).RenderFile(RenderFileRequest(file_id="fil_1"))

    assert refusal.value.reason == "SERVED_OVER_HTTP"
