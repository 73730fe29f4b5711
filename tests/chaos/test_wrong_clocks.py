"""A worker whose wall clock is ten minutes off, either way, works as any other."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from services.media.worker.tasks import RENEW_SECONDS
from tests.chaos.clocks.sitecustomize import OFF_SECONDS
from tests.chaos.test_crash_points import accepted, uploaded
from tests.eventually import eventually
from tests.installation import Mesh
from tests.people import Person, registered
from tests.photographs import photograph


@pytest.mark.timeout(300)
async def test_a_worker_with_a_wrong_clock_loses_no_lease_and_is_refused_nothing(mesh: Mesh) -> None:
    before = {name: len(said(mesh, name)) for name in OFF_SECONDS}
    histories = []
    async with registered(mesh.url) as person:
        file_id = await uploaded(person, photograph("retina.jpg"))

        async def each_has_renewed_a_lease() -> bool:
            job = await accepted(person, file_id, width=6000 - len(histories), fit="FIT_FIT", format="FORMAT_AVIF")
            histories.append(await ended(person, job.task_ids[0]))
            done = {name: outcomes(mesh, name, after) for name, after in before.items()}
            return all(any(line["seconds"] > RENEW_SECONDS for line in lines) for lines in done.values())

        await eventually(each_has_renewed_a_lease, within_seconds=120)

    for history in histories:
        steps = [(event["state"], event["attempt"]) for event in history]
        assert steps == [("STATE_QUEUED", 0), ("STATE_RUNNING", 1), ("STATE_SUCCEEDED", 1)]
    for name, seconds in OFF_SECONDS.items():
        assert {line["message"] for line in outcomes(mesh, name, before[name])} == {"task succeeded"}
        off = datetime.fromisoformat(said(mesh, name)[-1]["time"]) - datetime.now(UTC)
        assert abs(off.total_seconds() - seconds) < 300, "its clock was right"


def outcomes(mesh: Mesh, name: str, after: int) -> list[dict[str, Any]]:
    """Return what a worker says of how its tasks ended, from a line of its log on."""
    return [line for line in said(mesh, name)[after:] if line["message"].startswith("task ")]


async def ended(person: Person, task_id: str) -> list[dict[str, Any]]:
    """Return a task's events once it has ended."""

    async def over() -> list[dict[str, Any]] | None:
        events = (await person.http.get(f"tasks/{task_id}/events")).json()["events"]
        return events if events[-1]["state"] in {"STATE_SUCCEEDED", "STATE_FAILED"} else None

    events: list[dict[str, Any]] = await eventually(over, within_seconds=120)
    return events


def said(mesh: Mesh, name: str) -> list[dict[str, Any]]:
    """Return the lines of a program's log."""
    lines = (mesh.var / "log" / f"{name}.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]
