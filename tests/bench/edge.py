"""One JSON read through the edge against FastAPI and uvicorn doing the same work."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import create_async_engine

from tests.bench.report import Figures, arguments, tell
from tests.eventually import eventually
from tests.installation import Mesh, running
from tests.people import Person, registered
from tests.photographs import photograph
from tests.ports import free_port

CONNECTIONS = 16
SECONDS = 5
REPLICAS = 2  # of our services, and workers of uvicorn

HOW = (
    f"`GET /api/v1/tasks/{{id}}` by wrk, {CONNECTIONS} connections, {SECONDS} s a round. Ours: Envoy (JWT, JSON, rate "
    f"limit) and {REPLICAS} replicas of the task service (token, policy, one SQL read). FastAPI: {REPLICAS} uvicorn "
    "workers on uvloop, PyJWT (ES256) and one SQL read of the same row by SQLAlchemy. SQLite both. All on the same "
    "cores, the load generator too."
)


def wrk(url: str, token: str) -> dict[str, float]:
    """Return requests a second and latency of one round; fails if any answer was not 2xx."""
    command = [
        "wrk",
        "-t1",
        f"-c{CONNECTIONS}",
        f"-d{SECONDS}s",
        "--latency",
        "-H",
        f"Authorization: Bearer {token}",
        url,
    ]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in text:
        raise RuntimeError(f"some answers were refusals:\n{text}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    p50 = re.search(r"50%\s+([\d.]+)(us|ms|s)", text)
    assert rate
    assert p50
    return {
        "throughput": float(rate.group(1)),
        "median_latency": float(p50.group(1)) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[p50.group(2)],
    }


async def a_finished_task(person: Person) -> dict[str, Any]:
    path = photograph()
    file = await person.http.post("files", params={"name": path.name}, content=path.read_bytes())
    task = await person.http.post(
        "tasks", json={"inputFileId": file.json()["fileId"], "operation": {"resize": {"width": 320}}}
    )

    async def done() -> dict[str, Any] | None:
        found = (await person.http.get(f"tasks/{task.json()['taskId']}")).json()
        return found if found["state"] == "STATE_SUCCEEDED" else None

    return await eventually(done, within_seconds=30)


async def fill_peer(url: str, task: dict[str, Any]) -> None:
    os.environ["PEER_DATABASE_URL"] = url  # the peer reads it when it is imported
    from tests.bench import fastapi_peer as peer  # noqa: PLC0415 - not before

    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(peer.tasks.metadata.create_all)
        await connection.execute(
            insert(peer.tasks).values(
                task_id=task["taskId"], user_id=task["userId"], state=task["state"],
                input_file_id=task["inputFileId"], operation=json.dumps(task["operation"]),
                fraction=task["progress"]["fraction"], stage=task["progress"]["stage"],
                output_file_ids=json.dumps(task["outputFileIds"]), create_time=task["createTime"],
            )
        )  # fmt: skip
    await engine.dispose()


async def measure(mesh: Mesh, folder: Path, rounds: int) -> tuple[Figures, Figures]:
    theirs, ours = Figures("FastAPI + uvicorn"), Figures("Atelier, through the edge")
    async with registered(mesh.url) as person, httpx.AsyncClient() as plain:
        task = await a_finished_task(person)
        jwks = (await plain.get(f"{mesh.url}/.well-known/jwks.json")).text
        os.environ["PEER_JWKS"] = jwks
        await fill_peer(f"sqlite+aiosqlite:///{folder}/peer.db", task)
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", "tests.bench.fastapi_peer:app", "--port", str(port)]
        peer = subprocess.Popen([*command, "--workers", str(REPLICAS), "--no-access-log", "--log-level", "warning"])
        try:
            path = f"/api/v1/tasks/{task['taskId']}"
            await eventually(lambda: plain.get(f"http://127.0.0.1:{port}/docs"), within_seconds=20)
            for _ in range(rounds):
                await person.sign_in()  # a token lives five minutes
                token = person.http.headers["authorization"].removeprefix("Bearer ")
                theirs.add(**wrk(f"http://127.0.0.1:{port}{path}", token))
                ours.add(**wrk(f"{mesh.url}{path}", token))
        finally:
            peer.terminate()
            peer.wait()
    return theirs, ours


def main() -> None:
    options = arguments(__doc__ or "", rounds=5)
    if not shutil.which("wrk"):
        sys.exit("This needs wrk: apt-get install wrk")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unlimited = {"CONTROL_RATE_READ": "1000000:1000000"}
        with running(folder / "var", replicas=REPLICAS, settings=unlimited) as mesh:
            theirs, ours = asyncio.run(measure(mesh, folder, options.rounds))
    tell(
        "A JSON read through the edge",
        HOW,
        [theirs, ours],
        {"throughput": "requests/s", "median_latency": "ms"},
        {"fastapi": ours.ratios("throughput", theirs)},
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
