"""Renders through the real edge: who may see them, what a browser is told, and what too many of them cost."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from collections.abc import Callable

import httpx
import pytest
from PIL import Image

from tests.installation import Mesh
from tests.people import Person
from tests.photographs import photograph
from tests.system.test_health_under_work import ANSWER_SECONDS, answer_seconds, health_of
from tests.system.test_main_job import require_small_rocket, upload


async def test_an_image_is_seen_at_another_size_by_its_owner_while_it_is_there(person: Person, another: Person) -> None:
    path = f"files/{(await upload(person, photograph()))['fileId']}/render"

    cold = await person.http.get(path, params={"width": 320, "format": "webp"})
    warm = await person.http.get(path, params={"width": 320, "format": "webp"})
    known = await person.http.get(
        path, params={"width": 320, "format": "webp"}, headers={"if-none-match": cold.headers["etag"]}
    )
    head = await person.http.head(path, params={"width": 320}, headers={"accept": "image/avif,*/*"})
    anothers = await another.http.get(path, params={"width": 320})
    nobody = await person.http.get(path, params={"width": 320}, headers={"authorization": ""})
    none = await another.http.get("files/fil_none/render")
    wrong = await person.http.get(path, params={"wide": 320})
    sign_path = f"{person.http.base_url}{path.removesuffix('/render')}:sign"  # relative, it would be a scheme's
    sign = await person.http.post(sign_path, json={"render": "width=64"})
    signed = sign.json()["url"].removeprefix("/api/v1/")
    async with httpx.AsyncClient(base_url=person.http.base_url, timeout=60) as anybody:
        shown, forged = await anybody.get(signed), await anybody.get(signed.replace("width=64", "width=65"))
    deleted = await person.http.delete(path.removesuffix("/render"))
    gone = await person.http.get(path, params={"width": 320, "format": "webp"})

    require_small_rocket(cold.content)
    assert (warm.content, warm.headers["etag"]) == (cold.content, cold.headers["etag"])
    assert cold.headers["cache-control"] == "private, no-cache"
    assert (known.status_code, known.content) == (304, b"")
    assert (head.status_code, head.headers["content-type"], head.headers["vary"]) == (200, "image/avif", "accept")
    assert Image.open(io.BytesIO(shown.content)).size == (64, 43)
    assert (forged.status_code, forged.json()["details"][0]["reason"]) == (403, "URL_INVALID")
    assert anothers.status_code == none.status_code == gone.status_code == 404
    assert (nobody.status_code, wrong.status_code, deleted.status_code) == (401, 400, 200)
    assert anothers.json()["details"][0]["reason"] == gone.json()["details"][0]["reason"] == "FILE_NOT_FOUND"


@pytest.mark.timeout(300)
async def test_r28_of_ten_times_too_many_some_are_told_to_come_again_and_probes_are_answered(
    mesh: Mesh, person: Person, record_property: Callable[[str, object], None]
) -> None:
    noise = io.BytesIO()
    Image.effect_noise((800, 800), 90).convert("RGB").save(noise, "PNG")
    file = await person.http.post("files", params={"name": "noise.png"}, content=noise.getvalue())
    path = f"files/{file.json()['fileId']}/render"
    before = mesh.pids("media")

    async def asked(width: int) -> str:
        answer = await person.http.get(path, params={"width": width, "format": "avif"}, timeout=60)
        return "made" if answer.status_code == 200 else f"{answer.status_code} {answer.json()['details'][0]['reason']}"

    busy = await health_of(mesh, "media")
    asking = asyncio.gather(*(asked(200 + number) for number in range(160)))  # eight at each of two replicas
    took = await asyncio.gather(*(answer_seconds(channel, asking) for channel in busy))
    answers = Counter(await asking)
    for channel in busy:
        await channel.close()

    assert set(answers) == {"made", "429 RENDER_BUSY"}, answers
    assert mesh.pids("media") == before
    nine_of_ten = max(each[89] for each in took)
    assert nine_of_ten < 3 * ANSWER_SECONDS
    record_property(
        "R-28",
        f"160 at once: {answers['made']} made, the others told to come again; health in {nine_of_ten:.2f} s (p90)",
    )
