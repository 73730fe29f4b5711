"""docs/new-service.md, followed to the letter in a clean copy of the checkout, and what came up by that."""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc

from mesh import VERSION
from mesh.certificates import Leaf, write
from scripts.local.layout import Layout, mesh_environment
from tests.authority import TestAuthority
from tests.checkout import ROOT, copied
from tests.eventually import eventually
from tests.installation import Mesh, running
from tests.people import registered
from tests.system.test_identity import answer, leaf, listeners, registry, trusting

pytestmark = pytest.mark.timeout(600)  # the first test waits for it all: half a minute on an idle machine

DOCUMENT = (ROOT / "docs" / "new-service.md").read_text()
BLOCK = re.compile(
    r"(?:^\*\*`(?P<path>[^`]+)`\*\*\n\n)?"  # what the file is called, where it is one
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
UP = "scripts/up\n"


class Collector(otlp_grpc.TraceServiceServicer):
    """Keeps the spans that are sent to it, by service and trace."""

    def __init__(self) -> None:
        self.spans: dict[tuple[str, str], list] = {}

    def Export(self, request, context):
        for each in request.resource_spans:
            names = {attribute.key: attribute.value.string_value for attribute in each.resource.attributes}
            for span in (span for scope in each.scope_spans for span in scope.spans):
                self.spans.setdefault((names["service.name"], span.trace_id.hex()), []).append(span)
        return otlp.ExportTraceServiceResponse()


@dataclass
class House:
    """The copy with its new service, running, and what the document's commands said."""

    mesh: Mesh
    layout: Layout
    collector: Collector
    said: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("new")
    copy = copied(folder / "atelier")
    said: dict[str, str] = {}
    blocks = [block.groupdict() for block in BLOCK.finditer(DOCUMENT)]
    start = [block["text"] for block in blocks].index(UP)
    environment = {**os.environ, "XDG_CONFIG_HOME": str(folder), "NO_COLOR": "1", "COLUMNS": "200"}

    for block in blocks[:start]:
        if block["path"]:
            (copy / block["path"]).parent.mkdir(parents=True, exist_ok=True)
            (copy / block["path"]).write_text(block["text"])
        else:
            said[block["text"]] = shell(block["text"], copy, environment)

    collector, server = Collector(), grpc.server(ThreadPoolExecutor(2))
    otlp_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "500"}
    with running(copy / "var", settings=traced, root=copy) as mesh:
        layout = Layout.from_environment(mesh.environment)
        environment["ATELIER_SERVER"] = mesh.url
        for block in blocks[start + 1 :]:
            text = block["text"].replace("http://127.0.0.1:8080", mesh.url)
            text = text.replace("127.0.0.1:17190", f"127.0.0.1:{layout.envoy_admin_port}")
            said[block["text"]] = shell(text, copy, environment)
        yield House(mesh, layout, collector, said)
    server.stop(0).wait()


def shell(commands: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{commands}\n{done.stdout}{done.stderr}"
    return done.stdout


def saying(house: House, words: str) -> str:
    """Return what the document's block of commands with `words` in it said."""
    (said,) = [said for commands, said in house.said.items() if words in commands]
    return said


def test_every_file_of_the_document_is_taken_and_lies_in_the_services_own_folders() -> None:
    blocks = [block.groupdict() for block in BLOCK.finditer(DOCUMENT)]

    assert len(blocks) == DOCUMENT.count("```") / 2
    assert {block["language"] for block in blocks if not block["path"]} == {"sh"}
    folders = ("protos/atelier/note/", "services/note/", "tests/service/note/")
    assert [block["path"] for block in blocks if block["path"] and not block["path"].startswith(folders)] == []


def test_it_passes_the_checks_of_the_house(house: House) -> None:
    said = saying(house, "scripts/test")

    assert "All checks passed." in said
    assert re.search(r"\d+ passed", said)
    assert "skipped" not in said.partition("All checks passed.")[2]


async def test_it_answers_at_the_edge_and_does_once_what_is_asked_twice(house: House) -> None:
    async with registered(house.mesh.url) as ann, registered(house.mesh.url) as eve:
        made = [
            (await ann.http.post("notes", json={"text": "Buy milk"}, headers={"idempotency-key": "1"})).json()
            for _ in range(2)
        ]
        read = await ann.http.get(f"notes/{made[0]['noteId']}")
        anothers = await eve.http.get(f"notes/{made[0]['noteId']}")
        empty = await ann.http.post("notes", json={})

    assert made[0] == made[1] == read.json()
    assert made[0]["text"] == "Buy milk"
    assert (anothers.status_code, reason(anothers)) == (404, "NOTE_NOT_FOUND")
    assert (empty.status_code, reason(empty)) == (400, "TEXT_REQUIRED")
    assert '"text":"Buy milk"' in saying(house, "users/register")


def reason(response: httpx.Response) -> str:
    return response.json()["details"][0]["reason"]


async def test_it_is_in_the_registry_with_its_version_and_in_what_people_are_shown(house: House) -> None:
    def passing() -> list[dict]:
        with registry(house.layout) as consul:
            return consul.get("health/service/note", params={"passing": "true"}).json()

    (found,) = await eventually(passing, within_seconds=15)
    status = saying(house, "atelier mesh status")
    paths = httpx.get(f"{house.mesh.url}/openapi.json", timeout=30).json()["paths"]

    assert (found["Service"]["ID"], found["Service"]["Meta"]["version"]) == ("note-1", VERSION)
    assert re.search(rf"\bnote-1\b.*\b{re.escape(VERSION)}\b", status)
    assert "note (2)" in status
    assert {"/api/v1/notes", "/api/v1/notes/{noteId}"} <= paths.keys()


def test_nobody_gets_in_without_a_token(house: House) -> None:
    answers = [
        httpx.get(f"{house.mesh.url}/api/v1/notes/nte_1", timeout=30),
        httpx.post(f"{house.mesh.url}/api/v1/notes", json={"text": "Buy milk"}, timeout=30),
    ]

    assert [(each.status_code, reason(each)) for each in answers] == [(401, "TOKEN_MISSING")] * 2
    assert '"reason":"TOKEN_MISSING"' in saying(house, "users/register")


async def test_its_listener_refuses_whoever_is_not_of_the_mesh(house: House, tmp_path: Path) -> None:
    address = listeners(house.layout)["note-1"]
    ours = leaf(house.layout, "edge-1")
    foreign = TestAuthority((house.layout.secrets / "connect.id").read_text())  # the same names, another key
    write(tmp_path, foreign.pems("edge", roots=ours.present.roots.decode()))

    assert await answer(address, trusting(house.layout, ours))
    for stranger in (None, trusting(house.layout, None), trusting(house.layout, Leaf.of(tmp_path))):
        assert await answer(address, stranger) == b""


CALL = """
import asyncio
from atelier.note.v1 import note_pb2, note_pb2_grpc
from mesh import channel, errors
from mesh.certificates import Leaf
from services.media.config import WorkerConfig

async def main():
    config = WorkerConfig()
    leaf = Leaf.of(config.data_dir / "identity" / config.instance)
    async with channel.opened("note", config, leaf) as note:
        try:
            await note_pb2_grpc.NoteServiceStub(note).GetNote(note_pb2.GetNoteRequest(note_id="nte_1"))
        except errors.MeshError as error:
            print(error.code, error.reason, error.metadata.get("caller"))

asyncio.run(main())
"""


async def test_a_service_that_its_policy_does_not_name_may_not_call_it(house: House) -> None:
    told = {**mesh_environment(house.layout, {}, house.mesh.secret("broker")), "ATELIER_INSTANCE": "media-worker-1"}

    def refused() -> bool:
        done = subprocess.run(
            [house.mesh.root / ".venv" / "bin" / "python", "-c", CALL],
            env={"PATH": "", **told}, capture_output=True, text=True, timeout=60, check=False, cwd=house.mesh.root,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.stdout.split() == ["PERMISSION_DENIED", "CALLER_NOT_ALLOWED", "media-worker"], said
        return True

    await eventually(refused, within_seconds=30)  # on a busy machine a first connection may take longer than 5 s


def test_its_token_is_good_for_itself_alone_and_no_other_is_good_for_it(house: House) -> None:
    with registry(house.layout, "note") as note, registry(house.layout, "media") as other:
        own = note.get("agent/connect/ca/leaf/note")
        refused = [
            note.get("agent/connect/ca/leaf/auth"),
            note.put("agent/service/register", json={"Name": "auth", "ID": "auth-9", "Port": 1}),
            note.put("kv/config/note", content=b"{}"),
            other.get("agent/connect/ca/leaf/note"),
            other.put("agent/service/register", json={"Name": "note", "ID": "note-9", "Port": 1}),
        ]

    assert own.status_code == 200
    assert [each.status_code for each in refused] == [403] * len(refused)


async def test_what_it_does_can_be_seen(house: House) -> None:
    trace_id = uuid.uuid4().hex
    async with registered(house.mesh.url) as ann:
        traceparent = f"00-{trace_id}-00f067aa0ba902b7-01"
        made = await ann.http.post("notes", json={"text": "Buy milk"}, headers={"traceparent": traceparent})

    def lines() -> list[dict]:
        log = (house.layout.logs / "note-1.log").read_text().splitlines()
        written = [json.loads(line) for line in log if line.startswith("{")]
        return [line for line in written if line.get("request_id") == made.headers["x-request-id"]]

    (line,) = await eventually(lines, within_seconds=15)
    assert (line["logger"], line["message"]) == ("atelier.audit", "/atelier.note.v1.NoteService/CreateNote")
    assert (line["service"], line["instance"], line["user_id"]) == ("note", "note-1", ann.user_id)
    assert line["outcome"] == "OK"
    (span,) = await eventually(lambda: house.collector.spans.get(("note", trace_id)), within_seconds=30)
    assert span.name == "atelier.note.v1.NoteService/CreateNote"
    assert '"/atelier.note.v1.NoteService/CreateNote"' in saying(house, "grep NoteService")
    assert re.search(r"cluster\.note\.upstream_rq_completed: [1-9]", saying(house, "grep NoteService"))

    def health() -> list[str]:
        return [each["health"] for each in house.mesh.status()["processes"] if each["name"] == "note-1"]

    await eventually(lambda: health() == ["passing"], within_seconds=30)
