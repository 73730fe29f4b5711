"""People at work: they upload, ask for operations, watch or cancel, download, delete, and note what they are told."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from tests.chaos.journal import Job, Journal
from tests.people import PASSWORD
from tests.photographs import photograph

PHOTOGRAPHS = ("rocket.jpg", "astronaut.png", "coffee.png", "chelsea.png")
DAMAGED = "damaged.jpg"
JOBS_AT_ONCE = 3
JOBS_A_PERSON = 40  # well within what a new account may do in a month
ENDED = ("STATE_SUCCEEDED", "STATE_FAILED", "STATE_CANCELLED")
REQUEST_SECONDS = 20.0
GIVE_UP_SECONDS = 180.0  # one request, however often it is made again: then nothing heals by itself


class Refused(Exception):
    """An answer that is final: no repetition changes it."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        details = response.json().get("details") or [{}]
        self.reason = str(details[0].get("reason", response.status_code))
        super().__init__(f"{self.status} {self.reason}")


@dataclass(frozen=True)
class Picture:
    """A file of a person's."""

    file_id: str
    sha256: str
    faults: set[str]
    """The reasons for which what is done with it may fail."""


class Load:
    """As many people as `people` at a time, until `stop` is set; each ends what it has begun.

    Args:
        url: the edge.
        journal: what they note.
        people: how many.
        seed: of what they choose to do, not of when.
    """

    def __init__(self, url: str, journal: Journal, *, people: int, seed: int) -> None:
        self._url = url
        self._journal = journal
        self._people = people
        self._seed = seed
        self.stop = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self._people):
                group.create_task(self._seat(random.Random(f"{self._seed}/{number}")))

    async def _seat(self, choice: random.Random) -> None:
        """One person after another."""
        while not self.stop.is_set():
            async with httpx.AsyncClient(base_url=f"{self._url}/api/v1/", timeout=REQUEST_SECONDS) as http:
                await _Person(http, self._journal, choice, self.stop).live()


class _Person:
    def __init__(self, http: httpx.AsyncClient, journal: Journal, choice: random.Random, stop: asyncio.Event) -> None:
        self._http = http
        self._journal = journal
        self._choice = choice
        self._stop = stop
        self._name = f"u{uuid.uuid4().hex[:12]}"
        self._user_id = ""

    async def live(self) -> None:
        account = {"username": self._name, "email": f"{self._name}@example.com", "password": PASSWORD}
        made = await self._ask("POST", "users/register", json=account, key=self._name)
        self._user_id = made.json()["userId"]
        await self._sign_in()
        # Twice the same bytes: the second is stored over the first, and outlives its deletion.
        name = self._choice.choice(PHOTOGRAPHS)
        pictures = [await self._upload(name), await self._upload(name), await self._upload(DAMAGED)]
        turn = asyncio.Semaphore(JOBS_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for number in range(JOBS_A_PERSON):
                await turn.acquire()
                if self._stop.is_set():
                    break
                if number == JOBS_A_PERSON // 4:
                    deleted = pictures.pop(0)
                    deleted.faults.add("FILE_NOT_FOUND")
                    await self._ask("DELETE", f"files/{deleted.file_id}")
                picture = self._choice.choices(pictures, weights=[*[9] * (len(pictures) - 1), 1])[0]
                job = group.create_task(self._job(picture, self._choice.random()))
                job.add_done_callback(lambda _: turn.release())

    async def _upload(self, name: str) -> Picture:
        content = photograph("rocket.jpg" if name == DAMAGED else name).read_bytes()
        if name == DAMAGED:
            content = content[:40_000]  # its header is whole: only decoding it shows
        made = await self._ask(
            "POST",
            "files",
            params={"name": name},
            content=content,
            headers={"content-type": "application/octet-stream"},
            key=uuid.uuid4().hex,
        )
        faults = {"INPUT_DAMAGED"} if name == DAMAGED else set()
        return Picture(made.json()["fileId"], hashlib.sha256(content).hexdigest(), faults)

    async def _job(self, picture: Picture, fate: float) -> None:
        width = 40 + 40 * int(fate * 1000 % 20)
        operation = {"resize": {"width": width, "format": "FORMAT_WEBP"}}
        job = Job(self._user_id, uuid.uuid4().hex, picture.sha256, json.dumps(operation), picture.faults)
        self._journal.jobs.append(job)
        body = {"inputFileId": picture.file_id, "operation": operation}
        calls = 3 if fate < 0.1 else 1  # the same at once: one of them decides

        async def create() -> None:
            try:
                made = await self._ask("POST", "tasks", json=body, key=job.key)
            except Refused as refusal:
                job.refusal = refusal.reason  # the picture was deleted meanwhile, or a month's quota is used up
            else:
                job.task_ids.append(made.json()["taskId"])

        await asyncio.gather(*(create() for _ in range(calls)))
        if not job.task_ids:
            return
        task_id = job.task_ids[0]
        if 0.1 < fate < 0.3:
            await asyncio.sleep(fate - 0.1)
            with suppress(Refused):  # it has ended already
                await self._ask("POST", f"tasks/{task_id}:cancel", json={})
        end = await (self._watched if fate > 0.5 else self._polled)(task_id)
        if end["state"] == "STATE_CANCELLED" and fate < 0.2:
            await self._ask("POST", f"tasks/{task_id}:retry", json={}, settled=("TASK_NOT_RETRYABLE",))
            end = await self._polled(task_id)
        job.state = end["state"].removeprefix("STATE_")
        job.failure = end.get("error", {}).get("reason", "")
        if job.state == "SUCCEEDED":
            [file_id] = end["outputFileIds"]
            content = (await self._ask("GET", f"files/{file_id}/content")).content
            job.output_sha256 = hashlib.sha256(content).hexdigest()
            if fate > 0.9:
                await self._ask("DELETE", f"files/{file_id}", settled=("FILE_NOT_FOUND",))

    async def _polled(self, task_id: str) -> dict[str, Any]:
        while True:
            task: dict[str, Any] = (await self._ask("GET", f"tasks/{task_id}")).json()
            if task["state"] in ENDED:
                return task
            await asyncio.sleep(0.3)

    async def _watched(self, task_id: str) -> dict[str, Any]:
        """Follow the task's events, resuming where a stream broke off; each event must be newer than the last."""
        cursor, last = "", -1
        while True:
            headers = {"last-event-id": cursor} if cursor else {}
            try:
                async with self._http.stream("GET", f"tasks/{task_id}:watch", headers=headers) as stream:
                    self._journal.requests += 1
                    if stream.status_code != httpx.codes.OK:
                        await stream.aread()
                        await self._repeatable(stream)
                        continue
                    async for line in stream.aiter_lines():
                        if line.startswith("id:"):
                            cursor = line.removeprefix("id:").strip()
                        if line.startswith("data:") and '"state"' in line:
                            task: dict[str, Any] = json.loads(line.removeprefix("data:"))
                            place = int(cursor or 0)
                            if place < last:
                                raise AssertionError(f"a watch of {task_id} went back from {last} to {place}")
                            last = place
                            if task["state"] in ENDED:
                                return task
            except httpx.TransportError as failure:
                self._journal.failures[type(failure).__name__] += 1
                await asyncio.sleep(0.3)

    async def _sign_in(self) -> None:
        login = {"login": self._name, "password": PASSWORD}
        answer = await self._ask("POST", "users/login", json=login)
        self._http.headers["authorization"] = f"Bearer {answer.json()['accessToken']}"

    async def _ask(
        self, method: str, path: str, *, key: str = "", settled: tuple[str, ...] = (), **request: Any
    ) -> httpx.Response:
        """Make a request until it is answered for good; `settled` are refusals that an earlier try explains.

        Raises:
            Refused: for good, and not explained.
        """
        if key:
            request["headers"] = {**request.get("headers", {}), "idempotency-key": key}
        deadline = asyncio.get_running_loop().time() + GIVE_UP_SECONDS
        tries = 0
        while True:
            tries += 1
            self._journal.requests += 1
            try:
                response = await self._http.request(method, path, **request)
            except httpx.TransportError as failure:
                self._journal.failures[type(failure).__name__] += 1
            else:
                if response.is_success:
                    return response
                # A delete whose answer was lost has done its work.
                if tries > 1 and (method, response.status_code) == ("DELETE", httpx.codes.NOT_FOUND):
                    return response
                await self._repeatable(response, settled)
                if response.is_client_error and Refused(response).reason in settled:
                    return response
            if asyncio.get_running_loop().time() > deadline:
                raise AssertionError(f"{method} {path} was not answered for {GIVE_UP_SECONDS:.0f} s")
            await asyncio.sleep(self._choice.uniform(0.1, 0.6))

    async def _repeatable(self, response: httpx.Response, settled: tuple[str, ...] = ()) -> None:
        """Note a failure that may pass; sign in again where that helps.

        Raises:
            Refused: it will not pass.
        """
        if response.status_code == httpx.codes.UNAUTHORIZED and "authorization" in self._http.headers:
            await self._sign_in()  # tokens live for five minutes
            return
        passing = response.is_server_error or response.status_code in {409, 429}
        refusal = Refused(response) if "json" in response.headers.get("content-type", "") else None
        name = f"{response.status_code} {refusal.reason}" if refusal else f"{response.status_code}"
        if refusal and refusal.reason in settled:
            return
        if not passing or (refusal and refusal.reason == "QUOTA_EXCEEDED"):
            raise refusal or AssertionError(f"an answer without a shape: {response.status_code} {response.text[:200]}")
        self._journal.failures[name] += 1
