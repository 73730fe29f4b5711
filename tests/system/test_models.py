"""A task for a model, through the whole mesh: its pool, its worker, the weights that scripts/up installed."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from tests.installation import Mesh
from tests.people import Person
from tests.photographs import photograph
from tests.system.test_health_under_work import require_health
from tests.system.test_main_job import upload, watched


@pytest.mark.timeout(300)
async def test_a_background_is_removed(mesh: Mesh, person: Person) -> None:
    file = await upload(person, photograph())
    task = {"inputFileId": file["fileId"], "operation": {"removeBackground": {}}}

    created = await person.http.post("tasks", json=task)
    ended = await watched(person.http, created.json()["taskId"])

    assert ended["state"] == "STATE_SUCCEEDED"
    content = await person.http.get(f"files/{ended['outputFileIds'][0]}/content")
    result = Image.open(io.BytesIO(content.content))
    assert (result.format, result.size) == ("PNG", (640, 427))
    assert result.getpixel((10, 10))[3] < 10
    assert result.getpixel((321, 263))[3] > 200


@pytest.mark.timeout(300)
async def test_r20_a_worker_answers_probes_while_its_models_compute(mesh: Mesh, person: Person) -> None:
    file = await upload(person, photograph())

    async def done() -> None:
        for colour in ("#000000", "#ffffff"):
            task = {"inputFileId": file["fileId"], "operation": {"removeBackground": {"colour": colour}}}
            created = await person.http.post("tasks", json=task)
            assert (await watched(person.http, created.json()["taskId"]))["state"] == "STATE_SUCCEEDED"

    await require_health(mesh, "media-worker", done, at_a_time=2)
