import asyncio
import hashlib
from urllib.parse import urlsplit

import pytest
from atelier.storage.v1 import storage_pb2
from atelier.storage.v1.storage_pb2_grpc import StorageServiceStub
from sqlalchemy import insert

from mesh.errors import InvalidArgument, NotFound, PermissionDenied, Unimplemented
from services.storage.repository import SOME
from services.storage.tables import debt
from tests import mesh_server
from tests.eventually import eventually
from tests.service.storage.world import LIMIT_BYTES

PATH = "/api/v1/files"


def reason(response) -> tuple[int, str]:
    return response.status_code, response.json()["details"][0]["reason"]


def metadata(response) -> dict[str, str]:
    return response.json()["details"][0]["metadata"]


async def test_an_uploaded_photograph_comes_back_byte_for_byte(world, photos):
    photo = (photos / "rocket.jpg").read_bytes()

    stored = await world.upload(photo, name="rocket.jpg", **{"content-type": "image/jpeg"})
    async with world.http() as http:
        content = await http.get(f"{PATH}/{stored.json()['fileId']}/content")

    assert stored.status_code == 200
    assert stored.json() | {"fileId": "", "createTime": ""} == {
        "fileId": "",
        "name": "rocket.jpg",
        "contentType": "image/jpeg",
        "sizeBytes": str(len(photo)),
        "sha256": hashlib.sha256(photo).hexdigest(),
        "createTime": "",
        "taskId": "",
    }
    assert content.content == photo
    assert content.headers["content-type"] == "image/jpeg"
    assert content.headers["content-length"] == str(len(photo))
    assert content.headers["etag"] == f'"{stored.json()["sha256"]}"'
    assert content.headers["content-disposition"] == "inline; filename=\"rocket.jpg\"; filename*=UTF-8''rocket.jpg"
    assert content.headers["x-content-type-options"] == "nosniff"
    assert content.headers["cache-control"].startswith("private")


async def test_an_upload_charges_its_bytes_to_its_owner(world):
    stored = await world.upload(b"hello")

    usage = await world.stub().GetUsage(storage_pb2.GetUsageRequest())
    assert (usage.file_count, usage.size_bytes) == (1, 5)
    assert world.users.used == {stored.json()["fileId"]: 5}


async def test_a_text_file_called_a_photograph_is_refused_and_leaves_nothing(world):
    refusal = await world.upload(b"no photograph", name="a.jpg")

    assert reason(refusal) == (400, "CONTENT_TYPE_MISMATCH")
    assert metadata(refusal) == {"declared": "image/jpeg", "detected": "text/plain"}
    assert (await world.rows(), world.contents(), world.users.used) == ({}, set(), {})


async def test_bytes_that_are_another_kind_of_image_than_declared_are_refused(world, photos):
    photo = (photos / "rocket.jpg").read_bytes()

    refusal = await world.upload(photo, name="a", **{"content-type": "image/png"})

    assert reason(refusal) == (400, "CONTENT_TYPE_MISMATCH")
    assert metadata(refusal)["detected"] == "image/jpeg"


async def test_an_empty_body_is_refused(world):
    refusal = await world.upload(b"")

    assert reason(refusal) == (400, "FILE_EMPTY")
    assert metadata(refusal)["size_bytes"] == "0"
    assert world.contents() == set()


@pytest.mark.parametrize("name", ["", "a/b", "a\r\nb", "x" * 256])
async def test_a_malformed_name_is_refused(world, name):
    refusal = await world.upload(b"hello", name=name)

    assert reason(refusal) == (400, "FILE_NAME_MALFORMED")
    assert metadata(refusal)["length"] == str(len(name))


async def test_an_unknown_query_parameter_is_refused(world):
    async with world.http() as http:
        refusal = await http.post(PATH, params={"name": "a", "nmae": "b"}, content=b"hello")

    assert reason(refusal) == (400, "QUERY_MALFORMED")
    assert metadata(refusal)["parameter"] == "nmae"


async def test_a_length_over_the_limit_is_refused_before_the_body_is_sent(world):
    url = urlsplit(world.server.http_url)
    head = [f"POST {PATH}?name=a HTTP/1.1", "host: storage", f"content-length: {LIMIT_BYTES + 1}"]
    head += [f"{key}: {value}" for key, value in mesh_server.headers("usr_ann").items()]

    reader, writer = await asyncio.open_connection(url.hostname, url.port, ssl=world.server.tls())
    writer.write("\r\n".join([*head, "", ""]).encode())
    status = await asyncio.wait_for(reader.readline(), timeout=5)
    writer.close()

    assert status.startswith(b"HTTP/1.1 413 ")


async def test_a_body_without_a_length_is_refused_at_the_limit(world):
    async def endless():
        for _ in range(LIMIT_BYTES // 1024 + 1):
            yield bytes(1024)

    refusal = await world.upload(endless())

    assert reason(refusal) == (413, "FILE_TOO_LARGE")
    assert metadata(refusal) == {"limit_bytes": str(LIMIT_BYTES)}
    assert (await world.rows(), world.contents()) == ({}, set())


async def test_a_body_cut_short_leaves_nothing(world):
    url = urlsplit(world.server.http_url)
    head = [f"POST {PATH}?name=a HTTP/1.1", "host: storage", "content-length: 500000"]
    head += [f"{key}: {value}" for key, value in mesh_server.headers("usr_ann").items()]

    _, writer = await asyncio.open_connection(url.hostname, url.port, ssl=world.server.tls())
    writer.write("\r\n".join([*head, "", ""]).encode() + bytes(300_000))
    await eventually(lambda: world.contents() != set())
    writer.transport.abort()

    await eventually(lambda: world.contents() == set())
    assert (await world.rows(), world.users.used) == ({}, {})


async def test_a_used_up_quota_is_told_and_leaves_nothing(world):
    world.users.limit = 4

    refusal = await world.upload(b"hello")

    assert reason(refusal) == (429, "QUOTA_EXCEEDED")
    assert metadata(refusal)["metric"] == "storage_bytes"
    assert (await world.rows(), world.contents(), world.users.used) == ({}, set(), {})


async def test_an_upload_refused_for_quota_may_be_repeated_with_its_key_when_there_is_room(world):
    world.users.limit = 4
    await world.upload(b"hello", **{"idempotency-key": "k1"})
    world.users.limit = 5

    stored = await world.upload(b"hello", **{"idempotency-key": "k1"})

    assert stored.status_code == 200
    assert await world.rows() == {stored.json()["fileId"]: stored.json()["sha256"]}


async def test_a_repeated_upload_answers_the_first_file_and_is_charged_once(world):
    first = await world.upload(b"hello", **{"idempotency-key": "k1"})

    again = await world.upload(b"hello", **{"idempotency-key": "k1"})

    assert again.json() == first.json()
    assert world.users.used == {first.json()["fileId"]: 5}


async def test_uploads_at_once_with_one_key_make_one_file(world):
    answers = await asyncio.gather(*(world.upload(b"hello", **{"idempotency-key": "k1"}) for _ in range(5)))

    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["fileId"] for answer in answers}) == 1
    assert list(world.users.used.values()) == [5]


async def test_after_a_delete_a_key_is_free_for_one_new_file(world):
    key = {"idempotency-key": "k1"}
    first = (await world.upload(b"hello", **key)).json()["fileId"]
    await world.stub().DeleteFile(storage_pb2.DeleteFileRequest(file_id=first))

    again = [(await world.upload(b"other", **key)).json()["fileId"] for _ in range(2)]

    assert len(set(again)) == 1
    assert world.users.used == {again[0]: 5}


async def test_a_key_used_for_other_bytes_is_refused(world):
    await world.upload(b"hello", **{"idempotency-key": "k1"})

    refusal = await world.upload(b"other", **{"idempotency-key": "k1"})

    assert reason(refusal) == (400, "IDEMPOTENCY_KEY_REUSED")
    assert metadata(refusal)["request_id"] == "k1"


async def test_two_people_may_use_the_same_key(world):
    first = await world.upload(b"hello", user="usr_ann", **{"idempotency-key": "k1"})

    second = await world.upload(b"other", user="usr_bob", **{"idempotency-key": "k1"})

    assert second.json()["fileId"] != first.json()["fileId"]


async def test_a_range_comes_as_partial_content(world):
    stored = (await world.upload(b"0123456789")).json()

    async with world.http(range="bytes=2-4") as http:
        content = await http.get(f"{PATH}/{stored['fileId']}/content")

    assert (content.status_code, content.content) == (206, b"234")
    assert content.headers["content-range"] == "bytes 2-4/10"
    assert content.headers["content-length"] == "3"


async def test_a_range_behind_the_end_is_refused(world):
    stored = (await world.upload(b"0123456789")).json()

    async with world.http(range="bytes=10-") as http:
        refusal = await http.get(f"{PATH}/{stored['fileId']}/content")

    assert reason(refusal) == (416, "RANGE_NOT_SATISFIABLE")
    assert metadata(refusal)["size_bytes"] == "10"


@pytest.mark.parametrize("range_", ["bytes=2-4", "bytes=10-"])
async def test_head_knows_no_ranges(world, range_: str):
    file_id = (await world.upload(b"0123456789")).json()["fileId"]

    async with world.http(range=range_) as http:
        head = await http.head(f"/api/v1/files/{file_id}/content")

    assert (head.status_code, head.headers["content-length"]) == (200, "10")
    assert "content-range" not in head.headers


async def test_a_range_of_another_version_gives_the_whole(world):
    stored = (await world.upload(b"0123456789")).json()

    async with world.http(**{"range": "bytes=2-4", "if-range": '"other"'}) as http:
        content = await http.get(f"{PATH}/{stored['fileId']}/content")

    assert (content.status_code, content.content) == (200, b"0123456789")


async def test_what_the_browser_has_is_not_sent_again(world):
    stored = (await world.upload(b"0123456789")).json()

    async with world.http(**{"if-none-match": f'"x", W/"{stored["sha256"]}"'}) as http:
        content = await http.get(f"{PATH}/{stored['fileId']}/content")

    assert (content.status_code, content.content) == (304, b"")
    assert content.headers["etag"] == f'"{stored["sha256"]}"'


async def test_a_delete_that_the_mesh_repeats_has_succeeded_and_another_one_finds_nothing(world):
    file_id = (await world.upload(b"hello")).json()["fileId"]

    async def delete(request_id: str) -> None:
        channel = world.server.channel("usr_ann", metadata={"x-request-id": request_id})
        await StorageServiceStub(channel).DeleteFile(storage_pb2.DeleteFileRequest(file_id=file_id))

    await delete("req_1")
    await delete("req_1")
    with pytest.raises(NotFound) as refusal:
        await delete("req_2")
    with pytest.raises(NotFound):  # what was refused is no success either
        await delete("req_2")

    assert refusal.value.reason == "FILE_NOT_FOUND"


async def test_another_users_file_is_not_found(world):
    stored = (await world.upload(b"hello")).json()

    async with world.http("usr_bob") as http:
        content = await http.get(f"{PATH}/{stored['fileId']}/content")
    with pytest.raises(NotFound) as got:
        await world.stub("usr_bob").GetFile(storage_pb2.GetFileRequest(file_id=stored["fileId"]))
    with pytest.raises(NotFound) as deleted:
        await world.stub("usr_bob").DeleteFile(storage_pb2.DeleteFileRequest(file_id=stored["fileId"]))

    assert reason(content) == (404, "FILE_NOT_FOUND")
    assert (got.value.reason, deleted.value.reason) == ("FILE_NOT_FOUND", "FILE_NOT_FOUND")
    assert deleted.value.metadata == {"file_id": stored["fileId"]}


async def test_an_id_that_no_database_can_hold_is_refused(world):
    async with world.http("usr_ann") as http:
        assert reason(await http.get(f"{PATH}/fil_%00/content")) == (400, "FIELD_MALFORMED")


async def test_files_are_listed_newest_first_page_by_page(world):
    ids = [(await world.upload(f"{number}".encode())).json()["fileId"] for number in range(5)]
    await world.upload(b"not hers", user="usr_bob")

    listed, token = [], ""
    while True:
        page = await world.stub().ListFiles(storage_pb2.ListFilesRequest(page_size=2, page_token=token))
        listed.append([file.file_id for file in page.files])
        token = page.next_page_token
        if not token:
            break

    assert listed == [[ids[4], ids[3]], [ids[2], ids[1]], [ids[0]]]


async def test_a_token_of_no_page_is_refused(world):
    with pytest.raises(InvalidArgument) as refusal:
        await world.stub().ListFiles(storage_pb2.ListFilesRequest(page_token="x"))

    assert refusal.value.reason == "PAGE_TOKEN_MALFORMED"
    assert "pageToken" in refusal.value.violations


async def test_a_deleted_file_is_gone_with_its_bytes_and_its_charge(world):
    stored = (await world.upload(b"hello")).json()

    await world.stub().DeleteFile(storage_pb2.DeleteFileRequest(file_id=stored["fileId"]))

    assert (await world.rows(), world.contents(), world.users.used) == ({}, set(), {})


async def test_equal_bytes_are_kept_once_and_as_long_as_anybody_has_them(world):
    anns = (await world.upload(b"hello", user="usr_ann")).json()
    bobs = (await world.upload(b"hello", user="usr_bob")).json()
    assert world.contents() == {anns["sha256"]}

    await world.stub("usr_ann").DeleteFile(storage_pb2.DeleteFileRequest(file_id=anns["fileId"]))
    async with world.http("usr_bob") as http:
        content = await http.get(f"{PATH}/{bobs['fileId']}/content")

    assert content.content == b"hello"


async def test_a_delete_while_the_user_service_is_away_gives_the_quota_back_later(world):
    stored = (await world.upload(b"hello")).json()
    world.users.away = True
    await world.stub().DeleteFile(storage_pb2.DeleteFileRequest(file_id=stored["fileId"]))
    assert world.users.used == {stored["fileId"]: 5}
    world.users.away = False

    await world.upkeep.tend()

    assert (await world.rows(), world.users.used) == ({}, {})


async def test_a_delete_waits_little_for_a_user_service_that_does_not_answer(world):
    stored = (await world.upload(b"hello")).json()
    world.users.silent = True

    async with asyncio.timeout(5):
        await world.stub().DeleteFile(storage_pb2.DeleteFileRequest(file_id=stored["fileId"]))

    world.users.silent = False
    await world.upkeep.tend()
    assert (await world.rows(), world.users.used) == ({}, {})


async def test_a_quota_that_is_given_back_leaves_the_others_owed(world):
    stored = [(await world.upload(body)).json()["fileId"] for body in (b"hello", b"other")]
    world.users.away = True
    for file_id in stored:
        await world.stub().DeleteFile(storage_pb2.DeleteFileRequest(file_id=file_id))
    world.users.away = False

    await world.keeping.give_back(stored[0], "usr_ann")

    assert world.users.used == {stored[1]: 5}
    await world.upkeep.tend()
    assert (await world.rows(), world.users.used) == ({}, {})


async def test_quota_that_cannot_be_given_back_holds_up_no_other(world):
    broken = {f"fil_{number}" for number in range(SOME)}
    world.users.broken = broken
    async with world.sql.transaction() as connection:
        await connection.execute(insert(debt), [{"file_id": file_id} for file_id in broken])
    stored = (await world.upload(b"hello")).json()["fileId"]
    world.users.away = True
    await world.stub().DeleteFile(storage_pb2.DeleteFileRequest(file_id=stored))
    world.users.away = False

    for _ in range(5):  # in each of which one of 101 is left out
        await world.upkeep.tend()

    assert await world.rows() == {f"owed: {file_id}": "" for file_id in broken}


async def test_an_upload_while_the_user_service_is_away_is_unavailable_and_leaves_nothing(world):
    world.users.away = True

    refusal = await world.upload(b"hello")
    world.users.away = False
    await world.upkeep.tend()

    assert refusal.status_code == 503
    assert (await world.rows(), world.contents(), world.users.used) == ({}, set(), {})


async def test_the_task_service_may_look_at_its_users_files_only(world):
    stored = (await world.upload(b"hello")).json()
    stub = world.stub(None, caller="task")

    found = await stub.StatFile(storage_pb2.StatFileRequest(file_id=stored["fileId"], user_id="usr_ann"))
    with pytest.raises(NotFound) as others:
        await stub.StatFile(storage_pb2.StatFileRequest(file_id=stored["fileId"], user_id="usr_bob"))
    with pytest.raises(PermissionDenied) as outside:
        await world.stub().StatFile(storage_pb2.StatFileRequest(file_id=stored["fileId"], user_id="usr_ann"))

    assert (found.size_bytes, found.content_type) == (5, "text/plain")
    assert others.value.reason == "FILE_NOT_FOUND"
    assert outside.value.metadata["caller"] == "edge"


async def test_bytes_are_not_taken_over_grpc(world):
    with pytest.raises(Unimplemented) as refusal:
        await world.stub().UploadFile(storage_pb2.UploadFileRequest(name="a"))

    assert refusal.value.reason == "SERVED_OVER_HTTP"


async def test_without_a_token_nothing_is_read(world):
    async with world.http(None) as http:
        refusal = await http.get(f"{PATH}/fil_1/content")

    assert reason(refusal) == (401, "TOKEN_MISSING")
