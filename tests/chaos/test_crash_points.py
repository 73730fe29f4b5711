"""A process dies at each point between the statements that make, send, hand out, end and charge a task, or keep a file.

The points are those of `mesh.crash`, each reached for real, one after another, in one mesh that goes on working. In the
end nothing is lost, nothing was done twice, and nothing is left over.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sqlite3
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from mesh import crash
from tests.chaos.audit import UNCONFIRMED, UNFINISHED, Evidence, audited
from tests.chaos.journal import Job
from tests.chaos.storm import at_rest
from tests.eventually import eventually
from tests.installation import ROOT, Mesh
from tests.people import Person, registered
from tests.photographs import photograph
from tests.webhook_receiver import receiving

# In turns, so that whoever died is back when it is to die again. The webhook first, since its lease is the longest;
# workers near the end, after the task service: what their deaths leave waits for a lease to lapse and for a service
# that has seen it, and so passes for all at once.
POINTS = (
    "webhook: posted",
    "create: key kept",
    "quota for tasks: written",
    "create: file known",
    "quota for tasks: committed",
    "create: quota reserved",
    "create: task written",
    "create: events written",
    "create: committed",
    "publish: messages taken",
    "quota bound: event noted",
    "publish: confirmed",
    "quota bound: written",
    "publish: rows deleted",
    "quota bound: committed",
    "publish: done",
    "claim: written",
    "claim: committed",
    "SUCCEEDED: written",
    "SUCCEEDED: committed",
    "worker: claimed",
    "quota settled: event noted",
    "worker: result stored",
    "quota settled: written",
    "worker: completed",
    "quota settled: committed",
)

# Of calls that are made again with their key until they come through: each dies at one point after the other.
BATCH = tuple(f"batch: {step}" for step in ("key kept", "files known", "quota reserved", "written", "committed"))
CANCEL = ("CANCELLED: written", "CANCELLED: committed")
CANCEL_OF_A_BATCH = ("batch cancelled: written", "batch cancelled: committed")
FAILURE = (
    "FAILED: written",
    "FAILED: committed",
    "quota released: event noted",
    "quota released: written",
    "quota released: committed",
)
RETRY = ("retry: quota reserved", "QUEUED: written")
KEEPING = ("begun", "quota charged", "bytes kept", "finished")
UPLOAD = tuple(f"upload: {step}" for step in KEEPING)
RESULT = tuple(f"result: {step}" for step in KEEPING)
TAKE = tuple(f"take: {step}" for step in KEEPING if step != "bytes kept")

LONG = {"resize": {"width": 6000, "fit": "FIT_FIT", "format": "FORMAT_AVIF"}}  # some ten seconds, to be cancelled


def test_the_points_in_the_code_are_those_that_are_tried() -> None:
    patterns = [re.compile(pattern) for folder in ("mesh", "services") for pattern in points(ROOT / folder)]

    tried = (*POINTS, *BATCH, *CANCEL, *CANCEL_OF_A_BATCH, *FAILURE, *RETRY, *UPLOAD, *RESULT, *TAKE)
    assert [each.pattern for each in patterns if not any(map(each.fullmatch, tried))] == []
    assert [name for name in tried if not any(each.fullmatch(name) for each in patterns)] == []


def points(folder: Path) -> Iterator[str]:
    """Yield what the names of the points in a folder look like; what stands in braces is some words."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "crash.point":
                [name] = node.args
                parts = name.values if isinstance(name, ast.JoinedStr) else [name]
                yield "".join(
                    re.escape(str(part.value)) if isinstance(part, ast.Constant) else r"[\w ]+" for part in parts
                )


@pytest.mark.timeout(420)
async def test_a_process_that_dies_at_any_point_loses_nothing_and_does_nothing_twice(mesh: Mesh, armed: Path) -> None:
    jobs: list[Job] = []
    async with registered(mesh.url) as person, receiving() as receiver:
        assert (await person.http.put("webhook", json={"url": receiver.url()})).is_success
        file_id = await uploaded(person, photograph())
        for number, name in enumerate(POINTS):
            (armed / name).touch()
            jobs.append(await accepted(person, file_id, width=20 + number))
            await eventually((armed / f"{name}{crash.HIT}").exists, within_seconds=60)
        evidence = await settled(mesh, jobs)
        ends = {job.task_ids[0] for job in jobs}
        await eventually(lambda: {each.event["data"]["taskId"] for each in receiver.heard} == ends, within_seconds=60)
        first = [each.id for each in receiver.heard if each.event["data"]["taskId"] == jobs[0].task_ids[0]]

    assert len(set(receiver.ids())) == len(POINTS)
    assert len(first) > 1  # by whoever died, and once more
    assert len(set(first)) == 1
    assert audited(evidence, jobs).wrong == []
    mine = [task for task in evidence.rows["task", "task"] if task["user_id"] == person.user_id]
    assert [task["state"] for task in mine] == ["SUCCEEDED"] * len(POINTS)
    assert {task["task_id"] for task in mine} == {job.task_ids[0] for job in jobs}


@pytest.mark.timeout(420)
async def test_batches_cancels_and_files_that_break_off_anywhere_are_whole_in_the_end(mesh: Mesh, armed: Path) -> None:
    async with registered(mesh.url) as person:
        file = await through(armed, UPLOAD, lambda: put(person, photograph().read_bytes(), "photo.jpg", "upload"))
        # Without a key, and each time another: what breaks off is nobody's.
        await through(armed, UPLOAD, lambda: put(person, uuid.uuid4().bytes, "left.bin"))

        async def batch(key: str, *operations: object) -> httpx.Response:
            items = [{"inputFileId": file["fileId"], "operation": each} for each in operations]
            headers = {"idempotency-key": key}
            return await person.http.post(f"{mesh.url}/api/v1/tasks:batch", json={"items": items}, headers=headers)

        sizes = [{"resize": {"width": 80 + number}} for number in range(3)]
        made = await through(armed, BATCH, lambda: batch("batch", *sizes))
        long = await through(armed, (), lambda: batch("long", LONG, LONG))
        stopped = await through(
            armed, CANCEL_OF_A_BATCH, lambda: person.http.post(f"task-batches/{long['batchId']}:cancel")
        )
        alone = await accepted(person, file["fileId"], **LONG["resize"])
        cancelled = await through(armed, CANCEL, lambda: person.http.post(f"tasks/{alone.task_ids[0]}:cancel"))
        jobs = [alone]

        damaged = await put(person, photograph().read_bytes()[:5000], "damaged.jpg")
        arm(armed, FAILURE)
        jobs.append(await accepted(person, damaged.json()["fileId"], width=70))
        jobs[-1].input_faults.add("INPUT_DAMAGED")
        await hit(armed, FAILURE)
        await eventually(lambda: ended(person, jobs[-1]), within_seconds=60)
        await through(armed, RETRY, lambda: person.http.post(f"tasks/{jobs[-1].task_ids[0]}:retry", json={}))

        for names in (RESULT, *((name,) for name in TAKE)):
            arm(armed, names)
            jobs.append(await accepted(person, file["fileId"], width=90))
            await hit(armed, names)
            await eventually(lambda: ended(person, jobs[-1]), within_seconds=60)
        evidence = await settled(mesh, jobs)

    assert audited(evidence, jobs).wrong == []
    assert (made["taskCount"], stopped["stateCounts"]["cancelled"], cancelled["state"]) == (3, 2, "STATE_CANCELLED")
    mine = [task for task in evidence.rows["task", "task"] if task["user_id"] == person.user_id]
    assert Counter(task["state"] for task in mine) == {
        "SUCCEEDED": 3 + 1 + len(TAKE), "CANCELLED": 2 + 1, "FAILED": 1
    }  # fmt: skip
    assert Counter(task["batch_id"] for task in mine if task["batch_id"]) == {made["batchId"]: 3, long["batchId"]: 2}
    files = [row for row in evidence.rows["storage", "file"] if row["user_id"] == person.user_id]
    assert [row["file_id"] for row in files if row["name"] == "photo.jpg"] == [file["fileId"]]
    assert Counter(row["task_id"] for row in files if row["task_id"]) == {
        task["task_id"]: 1 for task in mine if task["state"] == "SUCCEEDED"
    }


async def through(armed: Path, names: Sequence[str], send: Callable[[], Awaitable[httpx.Response]]) -> dict[str, Any]:
    """Arm points, send a request until it is answered, all points met, and return the answer."""
    arm(armed, names)

    async def answered() -> httpx.Response | None:
        with suppress(httpx.TransportError):
            answer = await send()
            return None if answer.is_server_error else answer
        return None

    answer: httpx.Response = await eventually(answered, within_seconds=60)
    assert answer.is_success, answer.text
    await hit(armed, names)
    return answer.json()


def arm(armed: Path, names: Sequence[str]) -> None:
    for name in names:
        (armed / f"{name}{crash.HIT}").unlink(missing_ok=True)
        (armed / name).touch()


async def hit(armed: Path, names: Sequence[str]) -> None:
    await eventually(lambda: all((armed / f"{name}{crash.HIT}").exists() for name in names), within_seconds=60)


async def put(person: Person, content: bytes, name: str, key: str = "") -> httpx.Response:
    headers = {"idempotency-key": key} if key else {}
    return await person.http.post("files", params={"name": name}, content=content, headers=headers)


async def ended(person: Person, job: Job) -> bool:
    with suppress(httpx.TransportError):
        answer = await person.http.get(f"tasks/{job.task_ids[0]}")
        return answer.is_success and answer.json()["state"] in ("STATE_SUCCEEDED", "STATE_FAILED")
    return False


async def uploaded(person: Person, path: Path) -> str:
    file = await person.http.post("files", params={"name": path.name}, content=path.read_bytes())
    assert file.is_success, file.text
    return str(file.json()["fileId"])


async def accepted(person: Person, file_id: str, **resize: object) -> Job:
    """Ask for a task, again and again under one key, until that is answered."""
    operation = {"resize": resize}
    job = Job(person.user_id, uuid.uuid4().hex, file_id, json.dumps(operation))
    wanted = {"inputFileId": file_id, "operation": operation}

    async def created() -> httpx.Response | None:
        with suppress(httpx.TransportError):
            answer = await person.http.post("tasks", json=wanted, headers={"idempotency-key": job.key})
            return None if answer.is_server_error else answer
        return None

    answer: httpx.Response = await eventually(created, within_seconds=60)
    assert answer.is_success, answer.text
    job.task_ids.append(answer.json()["taskId"])
    return job


async def settled(mesh: Mesh, jobs: list[Job]) -> Evidence:
    """Return what the mesh keeps once nothing is under way, or waits to be put right."""

    async def put_right() -> Evidence | None:
        evidence = await at_rest(mesh)
        pending = audited(evidence, jobs).pending
        if pending:
            # Storage looks at what a dead worker left after minutes, of which the audit grants it twice as many.
            ago = [int(time.total_seconds() * 0.6 * 1_000_000) for time in (UNCONFIRMED, UNFINISHED)]
            age = "UPDATE file SET create_time = min(create_time, ? - iif(ready, ?, ?)) WHERE NOT (ready AND confirmed)"
            with closing(sqlite3.connect(mesh.var / "data" / "storage.db", timeout=30)) as storage, storage:
                storage.execute(age, [evidence.now, *ago])
            # And at bytes that no row has after the minute that it is told here, of which the audit grants it five.
            for path in (mesh.var / "data" / "blobs").glob("*/*"):
                with suppress(FileNotFoundError):
                    os.utime(path, 2 * (evidence.now / 1_000_000 - 120,))
        return None if pending else evidence

    evidence: Evidence = await eventually(put_right, within_seconds=180)
    return evidence
