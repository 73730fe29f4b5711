"""What an operator takes from the policies by Consul's own command, on the running mesh."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from scripts.local.layout import TOOLS, Layout
from tests.eventually import eventually
from tests.installation import Mesh
from tests.people import Person
from tests.photographs import photograph
from tests.system.test_identity import supervised
from tests.system.test_main_job import upload
from tests.system.test_refusals import require_refusal

BOUND_SECONDS = 3.0  # three times the promise: machines are shared
DENIED = "CALLER_DENIED_BY_INTENTION"


class Intentions:
    """Writes intentions as docs/operating.md tells."""

    def __init__(self, mesh: Mesh, layout: Layout) -> None:
        self._program = shutil.which("consul") or str(TOOLS / "consul")
        token = mesh.secret("consul.operator")
        self._environment = {**os.environ, "CONSUL_HTTP_ADDR": layout.consul_url, "CONSUL_HTTP_TOKEN": token}
        self._made: list[tuple[str, str]] = []

    def _run(self, *arguments: str) -> None:
        subprocess.run([self._program, "intention", *arguments], env=self._environment, check=True, capture_output=True)

    def create(self, action: str, source: str, destination: str) -> None:
        self._run("create", f"-{action}", source, destination)
        self._made.append((source, destination))

    def delete_all(self) -> None:
        while self._made:
            self._run("delete", *self._made[-1])
            self._made.pop()


@pytest.fixture
def layout(mesh: Mesh) -> Layout:
    return Layout.from_environment(mesh.environment)


@pytest.fixture
def intentions(mesh: Mesh, layout: Layout) -> Iterator[Intentions]:
    made = Intentions(mesh, layout)
    yield made
    made.delete_all()


async def settles(http: httpx.AsyncClient, path: str, status: int) -> httpx.Response:
    """Return the answer once every replica gives this status: several in a row do."""
    answers: list[httpx.Response] = []

    async def all_do() -> bool:
        answers[:] = [await http.get(path) for _ in range(6)]
        return {each.status_code for each in answers} == {status}

    await eventually(all_do, within_seconds=BOUND_SECONDS)
    return answers[-1]


async def test_a_denial_refuses_the_edge_at_both_listeners_of_a_service_until_it_is_deleted(
    mesh: Mesh, person: Person, intentions: Intentions
) -> None:
    file = await upload(person, photograph())
    listing, content = "files", f"files/{file['fileId']}/content"

    intentions.create("deny", "edge", "storage")
    by_grpc = await settles(person.http, listing, 403)
    by_http = await settles(person.http, content, 403)
    others = await person.http.get("users/me")
    intentions.delete_all()

    assert require_refusal(by_grpc, 403, DENIED) == {"caller": "edge", "service": "storage"}
    assert require_refusal(by_http, 403, DENIED) == {"caller": "edge", "service": "storage"}
    assert others.status_code == 200
    await settles(person.http, listing, 200)
    await settles(person.http, content, 200)


async def test_a_denial_between_services_is_told_to_whoever_asked_and_keeps_nothing(
    person: Person, intentions: Intentions
) -> None:
    file = await upload(person, photograph())
    intentions.create("deny", "task", "storage")

    async def refused() -> httpx.Response | None:
        asked = {"inputFileId": file["fileId"], "operation": {"resize": {"width": 64}}}
        answer = await person.http.post("tasks", json=asked)
        return answer if answer.status_code == 403 else None

    answer = await eventually(refused, within_seconds=BOUND_SECONDS)

    assert require_refusal(answer, 403, DENIED) == {"caller": "task", "service": "storage"}


async def test_an_exact_allow_outranks_a_denial_of_all_and_opens_nothing_more(
    person: Person, intentions: Intentions
) -> None:
    intentions.create("allow", "edge", "media")
    intentions.create("deny", "*", "media")
    intentions.create("deny", "edge", "storage")  # when this one is heard, so are the two before
    await settles(person.http, "files", 403)

    assert (await person.http.get("media/operations")).status_code == 200


async def test_administrators_see_who_is_denied(mesh: Mesh, person: Person, intentions: Intentions) -> None:
    await person.http.post(
        f"{mesh.url}/api/v1/users:grantAdmin", json={"login": person.username, "secret": mesh.secret("admin")}
    )
    await person.sign_in()

    async def denied() -> set[tuple[str, str]]:
        found = (await person.http.get("mesh/topology")).json()["permissions"]
        return {(each["caller"], each["callee"]) for each in found if each["denied"]}

    async def only_this() -> bool:
        return await denied() == {("edge", "media")}

    async def none() -> bool:
        return await denied() == set()

    intentions.create("deny", "edge", "media")
    await eventually(only_this, within_seconds=BOUND_SECONDS)
    intentions.delete_all()
    await eventually(none, within_seconds=BOUND_SECONDS)


async def test_a_denial_outlives_consuls_absence_and_can_be_deleted_after(
    layout: Layout, person: Person, intentions: Intentions
) -> None:
    intentions.create("deny", "edge", "media")
    await settles(person.http, "media/operations", 403)

    await supervised(layout, "stop", "consul")
    try:
        away = [(await person.http.get("media/operations")).status_code for _ in range(20)]
    finally:
        await supervised(layout, "start", "consul")

    async def opened() -> bool:
        with contextlib.suppress(subprocess.CalledProcessError):  # Consul has no leader at once
            intentions.delete_all()
        return (await person.http.get("media/operations")).status_code == 200

    await eventually(opened, within_seconds=60)
    assert set(away) == {403}
