"""Who is who inside the mesh: certificates on every connection, a registry that asks for tokens, roots that change."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from cryptography import x509

from mesh import contract
from mesh.certificates import Leaf, Pems, write
from scripts.local import authority, configs
from scripts.local.layout import BIN, ROOT, Layout, mesh_environment
from tests.authority import TestAuthority
from tests.eventually import eventually
from tests.installation import Mesh
from tests.people import Person
from tests.photographs import photograph
from tests.system.test_main_job import ENDED, upload, watched

RESIZE = {"resize": {"width": 64}}
GREETING = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # of HTTP/2; HTTP/1.1 answers it with 400
)
ALERT = 0x15  # the first byte of a TLS record that refuses


@pytest.fixture
def layout(mesh: Mesh) -> Layout:
    return Layout.from_environment(mesh.environment)


def leaf(layout: Layout, instance: str) -> Leaf:
    return Leaf.of(layout.data / "identity" / instance)


def registry(layout: Layout, token: str = "control") -> httpx.Client:
    """Return a client of Consul that has the token of a service."""
    headers = {"x-consul-token": (layout.secrets / f"consul.{token}").read_text()} if token else {}
    return httpx.Client(base_url=f"{layout.consul_url}/v1/", headers=headers, timeout=10)


def listeners(layout: Layout) -> dict[str, tuple[str, int]]:
    """Return where each instance listens for the mesh, by its name; a worker does not."""
    with registry(layout) as consul:
        services = consul.get("agent/services").json().values()
    return {each["ID"]: (each["Address"], each["Port"]) for each in services if each["Service"] != "media-worker"}


async def answer(address: tuple[str, int], tls: ssl.SSLContext | None) -> bytes:
    """Return the first bytes of an application's answer; nothing from one that refuses."""
    writer = None
    try:
        reader, writer = await asyncio.open_connection(*address, ssl=tls, server_hostname="" if tls else None)
        writer.write(GREETING)
        said = await asyncio.wait_for(reader.read(9), 5)
    except (OSError, ssl.SSLError):
        return b""
    finally:
        if writer:
            writer.transport.abort()
    return b"" if said[:1] == bytes([ALERT]) else said


async def test_strangers_are_refused_by_every_listener(layout: Layout, tmp_path: Path) -> None:
    ours = leaf(layout, "edge-1")
    foreign = TestAuthority((layout.secrets / "connect.id").read_text())  # the same names, another key
    write(tmp_path, foreign.pems("edge", roots=ours.present.roots.decode()))
    planes = {f"xds {port}": ("127.0.0.1", port) for port in layout.control_ports}
    for instance, address in (listeners(layout) | planes).items():
        plane = {"cafile": layout.secrets / "ads-ca.pem"} if instance in planes else {}
        member = trusting(layout, ours, **plane)
        stranger = trusting(layout, Leaf.of(tmp_path), **plane)
        nobody = trusting(layout, None, **plane)

        assert await answer(address, member), instance
        for tls in (None, nobody, stranger):
            assert await answer(address, tls) == b"", (instance, tls)


def trusting(layout: Layout, shown: Leaf | None, cafile: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=cafile or layout.data / "identity" / "edge-1" / "present" / "roots.pem")
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    if shown:
        newest = shown.folder / "present"
        context.load_cert_chain(newest / "certificate.pem", newest / "key.pem")
    return context


async def test_a_services_token_is_good_for_itself_alone(layout: Layout) -> None:
    with registry(layout, "storage") as storage, registry(layout, "") as nobody:
        own = storage.get("agent/connect/ca/leaf/storage")
        refused = [
            storage.get("agent/connect/ca/leaf/auth"),
            storage.put("kv/config/auth", content=b"{}"),
            storage.put("kv/config/storage", content=b"{}"),
            storage.put("agent/service/register", json={"Name": "auth", "ID": "auth-9", "Port": 1}),
            storage.put("kv/locks/auth/forget", content=b"storage-1"),
            storage.post(
                "connect/intentions", json={"SourceName": "edge", "DestinationName": "storage", "Action": "allow"}
            ),
            storage.get("acl/tokens"),
            storage.get("connect/ca/configuration"),
            nobody.get("agent/connect/ca/leaf/auth"),
            nobody.put("agent/service/register", json={"Name": "auth", "ID": "auth-9", "Port": 1}),
        ]
        hidden = [storage.get("agent/services").json(), nobody.get("agent/services").json()]

    assert own.status_code == 200
    assert [each.status_code for each in refused] == [403] * len(refused)
    assert {each["Service"] for each in hidden[0].values()} == {"storage", "storage-http"}
    assert hidden[1] == {}


async def test_secrets_and_keys_are_their_owners_alone(layout: Layout) -> None:
    for folder in (layout.secrets, layout.data / "identity", layout.configs):
        assert folder.stat().st_mode & 0o077 == 0 or folder.parent.stat().st_mode & 0o077 == 0
        for path in folder.rglob("*"):
            if path.is_file():
                assert path.stat().st_mode & 0o077 == 0, path


CALL = """
import asyncio
from atelier.user.v1 import user_pb2, user_pb2_grpc
from mesh import channel, errors
from mesh.certificates import Leaf
from services.media.config import WorkerConfig

async def main():
    config = WorkerConfig()
    leaf = Leaf.of(config.data_dir / "identity" / config.instance)
    async with channel.opened("user", config, leaf) as user:
        try:
            await user_pb2_grpc.UserServiceStub(user).ReserveQuota(user_pb2.ReserveQuotaRequest())
        except errors.MeshError as error:
            print(error.reason, error.metadata.get("caller"))

asyncio.run(main())
"""


def test_a_caller_that_the_policy_does_not_name_is_refused_though_it_is_one_of_us(mesh: Mesh, layout: Layout) -> None:
    # In a process of its own, because gRPC reads its xDS bootstrap once a process.
    told = {**mesh_environment(layout, {}, mesh.secret("broker")), "ATELIER_INSTANCE": "media-worker-1"}
    done = subprocess.run(
        [sys.executable, "-c", CALL],
        env={"PATH": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'generated'}", **told},
        capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
    )  # fmt: skip

    assert done.stdout.split() == ["CALLER_NOT_ALLOWED", "media-worker"], done.stdout + done.stderr


# What is open while the main job runs


def owners(mesh: Mesh) -> dict[int, str]:
    """Return the program of each process, children too, by process id."""
    found = {}
    for program in mesh.status()["processes"]:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(program["pid"])
            found |= {each.pid: program["name"] for each in (process, *process.children(recursive=True))}
    return found


def service(program: str) -> str:
    return {"envoy": "edge"}.get(program, program.rpartition("-")[0] or program)


async def test_no_connection_of_ours_is_in_clear_or_to_whom_the_policy_does_not_name(
    mesh: Mesh, layout: Layout, person: Person
) -> None:
    file = await upload(person, photograph())
    programs = owners(mesh)
    created = await person.http.post("tasks", json={"inputFileId": file["fileId"], "operation": RESIZE})
    watching = asyncio.create_task(watched(person.http, created.json()["taskId"]))
    seen: set[tuple[str, str, int]] = set()
    while not watching.done():
        seen |= connections(programs)
        await asyncio.sleep(0.02)
    assert (await watching)["state"] in ENDED

    third_party = {layout.consul_port, layout.broker_port}  # a token and a password; loopback only
    edge = trusting(layout, leaf(layout, "edge-1"))
    plane = trusting(layout, leaf(layout, "edge-1"), layout.secrets / "ads-ca.pem")
    methods = contract.installed().methods.values()
    ours = set()
    for client, server, port in seen:
        parts = (service(client), service(server))
        if port in third_party or {client, server} <= {"consul", "rabbitmq", "epmd"}:
            continue
        if client == "consul":  # its probes, of servers that know health and nothing else
            assert port not in {address[1] for address in listeners(layout).values()}, (client, server, port)
            continue
        ours.add(parts)
        tls = plane if port in layout.control_ports else edge
        assert await answer(("127.0.0.1", port), None) == b"", f"{client} talks to {server} in clear"
        assert await answer(("127.0.0.1", port), tls), f"{client} talks to {server} on {port}, which does not speak TLS"
        named = parts[1] == "control" or any(
            method.owner == parts[1] and method.allows(parts[0]) for method in methods
        )  # fmt: skip
        assert named, f"{client} talks to {server}, and no policy lets it"
    assert {("edge", "task"), ("edge", "storage"), ("task", "user"), ("media-worker", "storage")} <= ours
    assert {("edge", "control"), ("task", "control"), ("control", "auth")} <= ours


def connections(programs: dict[int, str]) -> set[tuple[str, str, int]]:
    """Return what is established inside the mesh: the client's program, the server's, and the server's port."""
    found = [each for each in psutil.net_connections("tcp") if each.pid in programs]
    listening = {each.laddr.port: programs[each.pid] for each in found if each.status == psutil.CONN_LISTEN}
    return {
        (programs[each.pid], listening[each.raddr.port], each.raddr.port)
        for each in found
        if each.status == psutil.CONN_ESTABLISHED and each.raddr.port in listening and each.laddr.port not in listening
    }


# Change


@contextlib.asynccontextmanager
async def load(person: Person) -> AsyncIterator[list[int]]:
    """Read without end; yields the status of each answer."""
    file = await upload(person, photograph())
    created = await person.http.post("tasks", json={"inputFileId": file["fileId"], "operation": RESIZE})
    task_id = created.json()["taskId"]
    await watched(person.http, task_id)
    answers: list[int] = []

    async def read() -> None:
        while True:
            answers.append((await person.http.get(f"tasks/{task_id}")).status_code)
            answers.append((await person.http.get(f"files/{file['fileId']}/content")).status_code)
            await asyncio.sleep(0.1)  # within the rates of one user

    readers = [asyncio.create_task(read()) for _ in range(4)]
    try:
        yield answers
        before = len(answers)
        await eventually(lambda: len(answers) > before + 50, within_seconds=30)
    finally:
        for reader in readers:
            reader.cancel()
        ends = await asyncio.gather(*readers, return_exceptions=True)
    assert {type(end) for end in ends} == {asyncio.CancelledError}, ends


def key_id(certificate: x509.Certificate, of_issuer: bool) -> bytes:
    if of_issuer:
        return certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier or b""
    return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


def all_leaves(layout: Layout) -> Iterator[Pems]:
    return (Leaf.of(folder).present for folder in (layout.data / "identity").iterdir())


async def test_the_root_is_replaced_under_load_and_no_call_fails(mesh: Mesh, layout: Layout, person: Person) -> None:
    root = authority.connect((layout.secrets / "connect.id").read_text())
    signer = key_id(root.certificate, of_issuer=False)
    async with load(person) as answers:
        await eventually(lambda: len(answers) > 50, within_seconds=20)

        configs.write_root(layout, root)
        await eventually(  # Consul spreads the renewal over half a minute
            lambda: {key_id(pems.leaf, of_issuer=True) for pems in all_leaves(layout)} == {signer}, within_seconds=90
        )
        await supervised(layout, "restart", "task-1", "storage-1")  # whose peers connect anew
    assert set(answers) == {200}
    again = await upload(person, photograph())
    created = await person.http.post("tasks", json={"inputFileId": again["fileId"], "operation": RESIZE})
    assert (await watched(person.http, created.json()["taskId"]))["state"] == "STATE_SUCCEEDED"


async def supervised(layout: Layout, *arguments: str) -> None:
    command = [BIN / "supervisorctl", "-s", f"unix://{layout.socket}", *arguments]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)


async def test_a_wiped_consul_has_everybody_back_as_the_same_authority(
    mesh: Mesh, layout: Layout, person: Person
) -> None:
    def names() -> set[str]:
        return {pems.spiffe_id.rpartition("/ns/")[0] for pems in all_leaves(layout)}

    def back() -> bool:
        with registry(layout) as consul:
            checks = consul.get("agent/checks").json().values()
        return {each["ServiceID"] for each in checks if each["Status"] == "passing"} == before

    with registry(layout) as consul:
        before = set(consul.get("agent/services").json())
    trust_domain = names()
    async with load(person) as answers:
        await supervised(layout, "stop", "consul")
        shutil.rmtree(layout.var / "consul")
        (layout.var / "consul").mkdir(mode=0o700)
        await supervised(layout, "start", "consul")
        await eventually(back, within_seconds=3 * 15)
        with registry(layout, "auth") as auth:
            fresh = auth.get("agent/connect/ca/leaf/auth").json()
        await eventually(
            lambda: any(pems.certificate.decode() == fresh["CertPEM"] for pems in all_leaves(layout)), within_seconds=30
        )

    assert set(answers) == {200}
    assert names() == trust_domain
    assert fresh["ServiceURI"].startswith(next(iter(trust_domain)))
    file = await upload(person, photograph())
    created = await person.http.post("tasks", json={"inputFileId": file["fileId"], "operation": RESIZE})
    assert (await watched(person.http, created.json()["taskId"]))["state"] == "STATE_SUCCEEDED"
