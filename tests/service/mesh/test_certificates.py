"""Who a process is among services, and whom it lets near: real handshakes, an authority of the tests' own."""

from __future__ import annotations

import asyncio
import ssl
import stat
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import grpc
import httpx
import pytest
from aiohttp import web
from atelier.task.v1 import task_pb2, task_pb2_grpc
from cryptography import x509
from starlette.requests import Request
from starlette.responses import Response

from mesh import certificates, errors
from mesh.certificates import Leaf, Pems
from mesh.channel import MeshChannel
from mesh.config import ServiceConfig
from scripts.local import authority
from tests.authority import TestAuthority, grpc_client, leaf
from tests.eventually import eventually
from tests.mesh_server import SERVICE, Server, headers, serving

UPLOAD = "/atelier.storage.v1.StorageService/UploadFile"
GET = task_pb2.GetTaskRequest(task_id="tsk_1")


class Tasks(task_pb2_grpc.TaskServiceServicer):
    async def GetTask(self, request, context):
        return task_pb2.Task(task_id=request.task_id)


async def done(request: Request) -> Response:
    return Response("done")


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving(
        partial(task_pb2_grpc.add_TaskServiceServicer_to_server, Tasks()), http={UPLOAD: done}
    ) as running:
        yield running


@pytest.fixture
async def present() -> AsyncIterator[Leaf]:
    """The certificate that the server under test shows; a test may renew it."""
    served = leaf(SERVICE)
    before = served.present
    yield served
    renew(served, before)


def renew(served: Leaf, pems: Pems) -> None:
    certificates.write(served.folder, pems)
    served.present = pems


async def called(server: Server, pems: Pems) -> str:
    """Return what comes of a new connection and a call by the holder of `pems`; OK, or the status of the failure."""
    async with grpc.aio.secure_channel(
        server.address, grpc_client(pems), options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        stub = task_pb2_grpc.TaskServiceStub(channel)
        try:
            await stub.GetTask(GET, metadata=list(headers("usr_1").items()), timeout=5)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"


async def uploaded(server: Server, tls: ssl.SSLContext) -> str:
    async with httpx.AsyncClient(base_url=server.http_url, headers=headers("usr_1"), verify=tls) as client:
        try:
            return (await client.post("/api/v1/files")).text
        except httpx.TransportError:
            return "refused"


async def test_only_who_has_a_certificate_of_this_mesh_is_let_near(server: Server, tmp_path: Path) -> None:
    foreign = TestAuthority().pems("edge", roots=leaf(SERVICE).present.roots.decode())  # same name, another authority
    certificates.write(tmp_path, foreign)
    nobody = ssl.create_default_context(cadata=leaf(SERVICE).present.roots.decode())

    assert await called(server, leaf("edge").present) == "OK"
    assert await called(server, foreign) == "UNAVAILABLE"
    assert await uploaded(server, server.tls()) == "done"
    assert await uploaded(server, Leaf(tmp_path, foreign).tls_client(SERVICE)) == "refused"
    assert await uploaded(server, nobody) == "refused"


async def test_plain_text_is_refused(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as plain:
        with pytest.raises(errors.Unavailable):
            await task_pb2_grpc.TaskServiceStub(MeshChannel(plain)).GetTask(GET)
    async with httpx.AsyncClient(base_url=server.http_url.replace("https", "http")) as client:
        with pytest.raises(httpx.TransportError):
            await client.post("/api/v1/files")


async def test_who_is_called_must_be_who_was_meant(server: Server) -> None:
    assert await uploaded(server, leaf("edge").tls_client("storage")) == "done"
    assert await uploaded(server, leaf("edge").tls_client("auth")) == "refused"


def test_a_name_of_another_trust_domain_is_no_name_here() -> None:
    ours = leaf("task")

    assert ours.service_of(ours.spiffe_id("user")) == "user"
    assert ours.service_of("spiffe://elsewhere.consul/ns/default/dc/dc1/svc/user") == ""
    assert ours.service_of("") == ""


async def test_a_root_is_replaced_while_connections_stay(server: Server, present: Leaf) -> None:
    old, new = present.present.roots.decode(), TestAuthority()
    before = server.channel("usr_1")
    await task_pb2_grpc.TaskServiceStub(before).GetTask(GET)

    renew(present, new.pems(SERVICE, roots=new.root.certificate_pem + old))
    both = [await called(server, new.pems("edge")), await called(server, leaf("edge").present)]
    renew(present, new.pems(SERVICE))
    late = [await called(server, new.pems("edge")), await called(server, new_trust(leaf("edge").present, new))]

    assert both == ["OK", "UNAVAILABLE"]  # the latter does not know the new root, which its server shows
    assert late == ["OK", "UNAVAILABLE"]  # the latter's own root is gone
    await task_pb2_grpc.TaskServiceStub(before).GetTask(GET)  # what was open stays


def new_trust(pems: Pems, root: TestAuthority) -> Pems:
    return Pems(pems.certificate, pems.key, root.root.certificate_pem.encode())


async def test_the_http_listener_takes_over_a_new_root_and_lets_the_old_one_go(
    server: Server, present: Leaf, tmp_path: Path
) -> None:
    new = TestAuthority()
    client = server.tls()

    renew(present, new.pems(SERVICE))

    assert await uploaded(server, new.leaf("edge", tmp_path).tls_client(SERVICE)) == "done"
    assert await uploaded(server, client) == "refused"


# On disk


def test_nobody_else_reads_a_key_and_a_reader_never_sees_parts_of_two(tmp_path: Path) -> None:
    signs = TestAuthority()
    pairs = [signs.pems("task") for _ in range(5)]

    for pems in pairs:
        certificates.write(tmp_path / "task-1", pems)

        assert Leaf.of(tmp_path / "task-1").present == pems
    kept = [path for path in (tmp_path / "task-1").rglob("*") if not path.is_symlink()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in kept if path.is_dir()} == {0o700}
    assert len([path for path in kept if path.is_dir()]) == 2  # the newest, and the one before for whoever is reading


def config(folder: Path, consul_url: str = "http://127.0.0.1:9") -> ServiceConfig:
    class Config(ServiceConfig):
        service = "task"

    (folder / "consul.task").write_text("token")
    return Config.model_validate(
        {
            "ATELIER_CONSUL_URL": consul_url, "ATELIER_BROKER_URL": "", "ATELIER_CONTROL_ADDRESSES": "",
            "ATELIER_DATA_DIR": folder, "ATELIER_SECRETS_DIR": folder, "ATELIER_INSTANCE": "task-1",
        }
    )  # fmt: skip


async def test_a_process_is_born_without_consul(tmp_path: Path) -> None:
    pems = TestAuthority().pems("task")
    certificates.write(tmp_path / "identity" / "task-1", pems)

    async with asyncio.timeout(2), certificates.kept(config(tmp_path)) as kept:
        assert (kept.present, kept.service) == (pems, "task")


@pytest.mark.parametrize("kept", ["expired", "another's", "half"])
async def test_what_is_kept_and_cannot_be_used_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    folder = tmp_path / "identity" / "task-1"
    if kept == "expired":
        monkeypatch.setattr(authority, "LIFETIME", -timedelta(minutes=1))
    certificates.write(folder, TestAuthority().pems("user" if kept == "another's" else "task"))
    if kept == "half":
        (folder / certificates.PRESENT / certificates.KEY).unlink()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3), certificates.kept(config(tmp_path)):
            pass


class Signing:
    """Stands for Consul: its root, and the newest of `leaves`, at once each time, as when the time of a wait is up."""

    def __init__(self) -> None:
        self.authority = TestAuthority()
        self.leaves = [self.authority.pems("task")]
        self.told: list[Pems] = []

    def renew(self) -> Pems:
        self.leaves.append(self.authority.pems("task"))
        return self.leaves[-1]

    async def answer(self, request: web.Request) -> web.Response:
        found: dict[str, object] = {}
        if request.path.endswith("/ca/roots"):
            found = {"Roots": [{"RootCert": self.authority.root.certificate_pem}]}
        elif request.path.endswith("/leaf/task"):
            newest = self.leaves[-1]
            self.told.append(newest)
            found = {"CertPEM": newest.certificate.decode(), "PrivateKeyPEM": newest.key.decode()}
        await asyncio.sleep(0.02)
        return web.json_response(found, headers={"X-Consul-Index": str(len(self.leaves))})


@pytest.fixture
async def signing() -> AsyncIterator[tuple[Signing, str]]:
    consul, application = Signing(), web.Application()
    application.router.add_get("/{path:.*}", consul.answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield consul, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_a_certificate_that_the_disk_did_not_take_is_kept_later(
    tmp_path: Path, signing: tuple[Signing, str]
) -> None:
    consul, url = signing
    folder, aside = tmp_path / "identity" / "task-1", tmp_path / "aside"
    async with certificates.kept(config(tmp_path, url)) as kept:
        folder.rename(aside)
        folder.touch()  # where a folder was: it cannot be written to
        renewed = consul.renew()
        await eventually(lambda: renewed in consul.told)
        await asyncio.sleep(0.2)
        folder.unlink()
        aside.rename(folder)

        await eventually(lambda: kept.present == renewed)
        assert Leaf.of(folder).present == renewed


def test_two_roots_are_trusted_whatever_ends_their_last_lines() -> None:
    root = leaf("task").present.roots.decode().strip()

    assert len(x509.load_pem_x509_certificates(certificates.joined([root, f"{root}\n"]))) == 2
