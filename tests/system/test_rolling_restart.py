"""R-14: every program of ours restarts, one after the other, at a steady load, and nobody at the edge notices."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest

from tests.eventually import eventually
from tests.installation import Mesh
from tests.people import PASSWORD, Person, registered
from tests.photographs import photograph
from tests.system.test_main_job import ENDED, upload

PAUSE_SECONDS = 0.1  # of each of those who ask; the load is steady, not heavy: machines are shared
MOST_TASKS = 90  # of a person; a month's quota is 100


class Load:
    """What people do at the edge all the time, over kept and over fresh connections; nobody repeats a request."""

    def __init__(self) -> None:
        self.answered: Counter[str] = Counter()
        self.failures: list[str] = []
        self.accepted: dict[str, list[str]] = {}
        self.ended: dict[str, str] = {}
        self._stop = asyncio.Event()
        self._watches: set[asyncio.Task[None]] = set()

    async def of(self, person: Person, *, fresh: bool) -> None:
        """Do all that one person does, until told to stop."""
        file_id = (await upload(person, photograph()))["fileId"]
        self.accepted[person.user_id] = []
        reads = ["users/me", "users/me/quota", "tasks?pageSize=2", f"files/{file_id}", f"files/{file_id}/content"]
        await asyncio.gather(
            self._repeated(0.1, lambda number: self._ask(person, fresh, "GET", reads[number % len(reads)])),
            self._repeated(1.0, lambda number: self._create(person, fresh, file_id, number)),
            self._repeated(2.0, lambda _: self._ask(person, fresh, "PATCH", "users/me", json={"displayName": "x"})),
            self._repeated(3.0, lambda _: self._upload(person, fresh)),
            self._repeated(10.0, lambda _: self._sign_in(person, fresh)),
        )

    def stop(self) -> None:
        self._stop.set()

    async def watched(self) -> None:
        """Wait until every accepted task has been seen to end."""
        await asyncio.gather(*self._watches)

    async def _repeated(self, pause_seconds: float, step: Callable[[int], Awaitable[object]]) -> None:
        number = 0
        while not self._stop.is_set():
            await step(number)
            number += 1
            await asyncio.sleep(pause_seconds)

    async def _ask(self, person: Person, fresh: bool, verb: str, path: str, **more: object) -> httpx.Response | None:
        """Return the answer; None when it is none, or a refusal, which is noted."""
        async with _client(person, fresh) as http:
            try:
                answer = await http.request(verb, path, **more)
            except httpx.TransportError as error:
                return self._failed(f"{verb} {path}", repr(error), fresh)
        self.answered[f"{verb} {path.partition('/')[0].partition('?')[0]}, {'fresh' if fresh else 'kept'}"] += 1
        if answer.status_code >= 400:
            return self._failed(f"{verb} {path}", f"{answer.status_code} {answer.text} {dict(answer.headers)}", fresh)
        return answer

    def _failed(self, what: str, how: str, fresh: bool) -> None:
        self.failures.append(f"{what} ({'fresh' if fresh else 'kept'}): {how}")

    async def _upload(self, person: Person, fresh: bool) -> None:
        content, headers = photograph().read_bytes(), {"content-type": "image/jpeg"}
        await self._ask(person, fresh, "POST", "files", params={"name": "a.jpg"}, content=content, headers=headers)

    async def _sign_in(self, person: Person, fresh: bool) -> None:
        answer = await self._ask(
            person, fresh, "POST", "users/login", json={"login": person.username, "password": PASSWORD}
        )
        if answer:
            person.http.headers["authorization"] = f"Bearer {answer.json()['accessToken']}"

    async def _create(self, person: Person, fresh: bool, file_id: str, number: int) -> None:
        accepted = self.accepted[person.user_id]
        if len(accepted) >= MOST_TASKS:
            return
        body = {"inputFileId": file_id, "operation": {"resize": {"width": 16 + number}}}
        answer = await self._ask(person, fresh, "POST", "tasks", json=body)
        if answer:
            accepted.append(answer.json()["taskId"])
            self._watches.add(asyncio.create_task(self._watch(person, fresh, accepted[-1])))

    async def _watch(self, person: Person, fresh: bool, task_id: str) -> None:
        """Watch a task to its end; a stream that breaks off is resumed where it was."""
        last: dict[str, str] = {}
        while task_id not in self.ended:
            try:
                async with (
                    _client(person, fresh) as http,
                    http.stream("GET", f"tasks/{task_id}:watch", headers=last) as stream,
                ):
                    if stream.status_code != 200:
                        return self._failed("watch", f"{stream.status_code} {await stream.aread()!r}", fresh)
                    async for line in stream.aiter_lines():
                        name, _, value = line.partition(":")
                        if name == "id":
                            last = {"last-event-id": value.strip()}
                        elif name == "data" and (state := json.loads(value).get("state")) in ENDED:
                            self.ended[task_id] = state
            except httpx.RemoteProtocolError:
                self.answered["watch, resumed"] += 1
            except httpx.TransportError as error:
                return self._failed("watch", repr(error), fresh)
            else:
                self.answered["watch"] += 1
        return None


@asynccontextmanager
async def _client(person: Person, fresh: bool) -> AsyncIterator[httpx.AsyncClient]:
    """Hold who speaks for a person: always the same, or one that has no connection yet."""
    if not fresh:
        yield person.http
        return
    async with httpx.AsyncClient(base_url=person.http.base_url, headers=person.http.headers, timeout=60) as http:
        yield http


@pytest.mark.timeout(600)
async def test_r14_a_rolling_restart_of_everything_fails_no_request_and_loses_no_task(mesh: Mesh) -> None:
    before = processes(mesh)
    load = Load()
    async with AsyncExitStack() as stack:
        people = [await stack.enter_async_context(registered(mesh.url)) for _ in range(4)]
        doing = [asyncio.create_task(load.of(person, fresh=bool(n % 2))) for n, person in enumerate(people)]
        await eventually(lambda: sum(load.answered.values()) > 100, within_seconds=60)

        restarted = await asyncio.to_thread(mesh.script, "restart", timeout=500)

        load.stop()
        await asyncio.gather(*doing)
        await asyncio.wait_for(load.watched(), 90)
        assert restarted.returncode == 0, restarted.stdout + restarted.stderr
        assert load.failures == []
        for person in people:
            accepted = load.accepted[person.user_id]
            assert Counter(load.ended[task_id] for task_id in accepted) == {"STATE_SUCCEEDED": len(accepted)}
            # A request that was sent again by the edge was done once.
            await eventually(lambda person=person: settled(person, load), within_seconds=30)
    after = processes(mesh)
    kept = {"epmd", "consul", "rabbitmq", "envoy"}  # Envoy itself was replaced, under what runs it
    assert {name for name, pid in after.items() if pid == before[name]} == kept
    assert mesh.status()["ready"]


def processes(mesh: Mesh) -> dict[str, int]:
    return {process["name"]: process["pid"] for process in mesh.status()["processes"]}


async def settled(person: Person, load: Load) -> bool:
    """Tell whether quota was charged once for each accepted task, and no other."""
    quota = (await person.http.get("users/me/quota")).json()["tasks"]
    return (quota["used"], quota["reserved"]) == (str(len(load.accepted[person.user_id])), "0")
