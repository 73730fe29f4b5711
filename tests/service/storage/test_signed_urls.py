"""URLs that need no token: good for one thing, for a while, for a file that is there."""

from datetime import UTC, datetime, timedelta

import httpx
import pytest
from atelier.storage.v1 import storage_pb2
from google.protobuf.duration_pb2 import Duration

from mesh import urls
from mesh.errors import InvalidArgument, NotFound
from tests.databases import on_sqlite
from tests.mesh_server import URL_KEY

pytestmark = on_sqlite  # nothing here is asked of a database that it would not say elsewhere


async def signed(world, file_id: str, user: str = "usr_ann", **wanted) -> storage_pb2.SignedUrl:
    return await world.stub(user).SignFileUrl(storage_pb2.SignFileUrlRequest(file_id=file_id, **wanted))


async def fetched(world, url: str, **headers: str) -> httpx.Response:
    async with world.http(None, **headers) as http:
        return await http.get(url)


def reason(refusal: httpx.Response) -> tuple[int, str]:
    return refusal.status_code, refusal.json()["details"][0]["reason"]


async def test_a_signed_url_gives_the_content_without_a_token_also_in_part(world):
    file_id = (await world.upload(b"hello")).json()["fileId"]
    url = (await signed(world, file_id)).url

    whole, part = await fetched(world, url), await fetched(world, url, range="bytes=1-2")

    assert (whole.status_code, whole.content, part.status_code, part.content) == (200, b"hello", 206, b"el")
    assert reason(await fetched(world, url.partition("?")[0])) == (401, "TOKEN_MISSING")


async def test_it_lasts_as_long_as_was_asked_for(world):
    file_id = (await world.upload(b"hello")).json()["fileId"]
    before = datetime.now(UTC)

    usual, short = await signed(world, file_id), await signed(world, file_id, lifetime_duration=Duration(seconds=60))

    for answer, lifetime in ((usual, timedelta(hours=1)), (short, timedelta(seconds=60))):
        assert timedelta() <= answer.expire_time.ToDatetime(UTC) - before - lifetime < timedelta(seconds=30)


async def test_what_is_not_as_it_was_signed_is_refused(world):
    first, second = [(await world.upload(body)).json()["fileId"] for body in (b"hello", b"other")]
    url = (await signed(world, first)).url
    target = url.partition("?")[0]
    now = datetime.now(UTC)

    refusals = [
        await fetched(world, each)
        for each in (
            url.replace(first, second),
            url.replace("?", "?x=1&"),
            url + "x",
            urls.signed("0" * 64, "usr_ann", target, now + timedelta(hours=1)),
            (await signed(world, first, render="width=64")).url.replace("/render", "/content"),
        )
    ]
    expired = await fetched(world, urls.signed(URL_KEY, "usr_ann", target, now - timedelta(seconds=1)))

    assert {reason(each) for each in refusals} == {(403, "URL_INVALID")}
    assert reason(expired) == (403, "URL_EXPIRED")


async def test_it_signs_nothing_for_who_does_not_own_the_file_and_ends_with_it(world):
    file_id = (await world.upload(b"hello")).json()["fileId"]
    url = (await signed(world, file_id)).url

    with pytest.raises(NotFound) as refusal:
        await signed(world, file_id, "usr_bob")
    with pytest.raises(InvalidArgument):
        await signed(world, file_id, render="width=64&signature=#")
    await world.stub().DeleteFile(storage_pb2.DeleteFileRequest(file_id=file_id))

    assert refusal.value.reason == "FILE_NOT_FOUND"
    assert reason(await fetched(world, url)) == (404, "FILE_NOT_FOUND")


async def test_it_stands_in_for_a_token_nowhere_else(world):
    file_id = (await world.upload(b"hello")).json()["fileId"]
    signature = (await signed(world, file_id)).url.partition("signature=")[2]

    async with world.http(None, **{urls.SIGNATURE_KEY: signature}) as http:
        refusal = await http.post("/api/v1/files", params={"name": "a.txt"}, content=b"hello")

    assert reason(refusal) == (401, "TOKEN_MISSING")
