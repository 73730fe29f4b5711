"""The main job three ways: upload a photograph, ask for an operation, watch it, download the result."""

from __future__ import annotations

import io
import json
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import httpx
from atelier.media.v1 import media_pb2
from atelier.task.v1 import task_pb2, task_pb2_grpc
from PIL import Image

from tests.eventually import eventually
from tests.installation import Mesh
from tests.people import Person
from tests.photographs import photograph

ENDED = {"STATE_SUCCEEDED", "STATE_FAILED", "STATE_CANCELLED"}


def require_small_rocket(content: bytes, size: tuple[int, int] = (320, 214)) -> None:
    """Check format, size and a colour against Pillow's own reading of the photograph."""
    result = Image.open(io.BytesIO(content))
    expected = Image.open(photograph()).convert("RGB").resize(size)

    assert result.format == "WEBP"
    assert result.size == size
    for point in ((20, 20), (160, 100), (300, 200)):
        got, want = result.convert("RGB").getpixel(point), expected.getpixel(point)
        assert all(abs(a - b) < 24 for a, b in zip(got, want, strict=True)), (point, got, want)


async def upload(person: Person, path: Path) -> dict[str, str]:
    response = await person.http.post(
        "files", params={"name": path.name}, content=path.read_bytes(), headers={"content-type": "image/jpeg"}
    )
    assert response.status_code == 200, response.text
    return response.json()


async def test_the_main_job_by_json_and_server_sent_events(person: Person) -> None:
    file = await upload(person, photograph())
    created = await person.http.post(
        "tasks",
        json={"inputFileId": file["fileId"], "operation": {"resize": {"width": 320, "format": "FORMAT_WEBP"}}},
        headers={"idempotency-key": "once"},
    )
    task = created.json()
    assert created.status_code == 200, created.text
    assert task["state"] == "STATE_QUEUED"

    states = []
    async with person.http.stream("GET", f"tasks/{task['taskId']}:watch") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        ids = []
        async for line in stream.aiter_lines():
            if line.startswith("id:"):
                ids.append(line)
            if line.startswith("data:"):
                states.append(json.loads(line.removeprefix("data:")))
    final = states[-1]
    content = await person.http.get(f"files/{final['outputFileIds'][0]}/content")

    assert final["state"] == "STATE_SUCCEEDED", final
    assert final["progress"] == {"fraction": 1, "stage": "done"}
    assert ids
    assert content.headers["content-type"] == "image/webp"
    require_small_rocket(content.content)
    assert (await person.http.get(f"tasks/{task['taskId']}")).json() == final


async def test_the_main_job_by_generated_stubs(mesh: Mesh, person: Person) -> None:
    file = await upload(person, photograph())
    metadata = (("authorization", f"Bearer {person.token}"),)
    async with grpc.aio.insecure_channel(urlsplit(mesh.url).netloc) as channel:
        tasks = task_pb2_grpc.TaskServiceStub(channel)
        task = await tasks.CreateTask(
            task_pb2.CreateTaskRequest(
                input_file_id=file["fileId"],
                operation=media_pb2.Operation(resize=media_pb2.Resize(width=320, format=media_pb2.FORMAT_WEBP)),
            ),
            metadata=metadata,
        )
        seen = [
            update.task.state
            async for update in tasks.WatchTask(task_pb2.WatchTaskRequest(task_id=task.task_id), metadata=metadata)
        ]
        final = await tasks.GetTask(task_pb2.GetTaskRequest(task_id=task.task_id), metadata=metadata)
    content = await person.http.get(f"files/{final.output_file_ids[0]}/content")

    assert seen[-1] == task_pb2.Task.STATE_SUCCEEDED
    assert sorted(seen) == seen, "states never go backwards"
    require_small_rocket(content.content)


async def test_the_main_job_by_the_command(mesh: Mesh, tmp_path: Path) -> None:
    register = mesh.atelier(
        "register", "--username", "by-command", "--email", "by-command@example.com", "--password-stdin",
        home=tmp_path, stdin="correct horse battery\n",
    )  # fmt: skip
    assert register.returncode == 0, register.stderr
    photo = photograph()

    run = mesh.atelier("run", "resize", str(photo), "--width", "320", "-o", "small.webp", home=tmp_path)

    assert run.returncode == 0, run.stdout + run.stderr
    require_small_rocket((tmp_path / "small.webp").read_bytes())
    listed = json.loads(mesh.atelier("--json", "tasks", home=tmp_path).stdout)
    assert [task["state"] for task in listed["tasks"]] == ["STATE_SUCCEEDED"]


async def test_a_batch_by_json_and_long_polls(mesh: Mesh, person: Person) -> None:
    file = await upload(person, photograph())
    items = [{"inputFileId": file["fileId"], "operation": {"resize": {"width": width}}} for width in (16, 32, 64)]

    # The whole URL: httpx takes what stands before a colon for a scheme.
    url = f"{mesh.url}/api/v1/tasks:batch"
    created = await person.http.post(url, json={"items": items, "deadlineDuration": "600s"})
    batch = created.json()
    assert created.status_code == 200, created.text
    tasks = (await person.http.get("tasks", params={"batchId": batch["batchId"]})).json()["tasks"]
    ended = [(await person.http.get(f"tasks/{task['taskId']}", params={"wait": "30s"})).json() for task in tasks]

    assert (batch["taskCount"], batch["stateCounts"]["queued"]) == (3, 3)
    assert [task["state"] for task in ended] == ["STATE_SUCCEEDED"] * 3
    whole = (await person.http.get(f"task-batches/{batch['batchId']}")).json()
    assert (whole["fraction"], whole["stateCounts"]["succeeded"]) == (1, 3)
    quota = (await person.http.get("users/me/quota")).json()
    assert int(quota["tasks"]["used"]) + int(quota["tasks"]["reserved"]) == 3


async def test_a_success_is_charged_and_nothing_stays_reserved(person: Person) -> None:
    file = await upload(person, photograph())
    created = await person.http.post(
        "tasks", json={"inputFileId": file["fileId"], "operation": {"convert": {"format": "FORMAT_PNG"}}}
    )
    await watched(person.http, created.json()["taskId"])

    async def charged() -> bool:
        quota = (await person.http.get("users/me/quota")).json()
        return quota["tasks"] == {"limit": "100", "used": "1", "reserved": "0"} and (
            quota["storageBytes"]["reserved"] == "0"
        )

    await eventually(charged, within_seconds=15)


async def watched(http: httpx.AsyncClient, task_id: str) -> dict[str, object]:
    """Return the task once it has ended."""
    async with http.stream("GET", f"tasks/{task_id}:watch") as stream:
        lines = [line async for line in stream.aiter_lines()]
    last = [json.loads(line.removeprefix("data:")) for line in lines if line.startswith("data:")]
    assert last, (stream.status_code, lines)
    assert last[-1]["state"] in ENDED
    return last[-1]
