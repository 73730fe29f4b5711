"""Through the edge of a whole mesh: a server of the user's hears of a task's end."""

from __future__ import annotations

from typing import Any

from tests.eventually import eventually
from tests.people import Person
from tests.photographs import photograph
from tests.system.test_main_job import upload
from tests.webhook_receiver import receiving


async def test_the_end_of_a_task_arrives_and_can_be_had_again(person: Person) -> None:
    file = await upload(person, photograph())
    async with receiving() as receiver:
        webhook = (await person.http.put("webhook", json={"url": receiver.url(host="127.0.0.2")})).json()
        created = await person.http.post(
            "tasks", json={"inputFileId": file["fileId"], "operation": {"resize": {"width": 64}}}
        )
        task_id = created.json()["taskId"]

        async def delivered() -> dict[str, Any] | None:
            found = (await person.http.get("webhook-deliveries", params={"taskId": task_id})).json()["deliveries"]
            return found[0] if found and found[0]["state"] == "STATE_DELIVERED" else None

        first = await eventually(delivered, within_seconds=60)
        again = await person.http.post(f"webhook-deliveries/{first['deliveryId']}:resend", json={})
        await eventually(lambda: len(receiver.heard) == 2, within_seconds=30)

    task = (await person.http.get(f"tasks/{task_id}")).json()
    assert again.json()["state"] == "STATE_PENDING"
    assert (first["attempts"], first["status"], first["eventId"]) == (1, 204, receiver.heard[0].id)
    assert receiver.ids() == [first["eventId"]] * 2
    assert all(each.verified_by(webhook["secret"]) for each in receiver.heard)
    assert all(
        each.event == {"type": "atelier.task.v1.TaskSucceeded", "timestamp": task["endTime"], "data": task}
        for each in receiver.heard
    )


async def test_a_hostile_url_is_refused_at_the_edge(person: Person) -> None:
    for hostile in ("http://127.0.0.1:8500/v1/kv/", "http://169.254.169.254/", "https://user@127.0.0.2/"):
        refused = await person.http.put("webhook", json={"url": hostile})

        error = refused.json()
        assert refused.status_code == 400, refused.text
        assert error["details"][0]["reason"] == "WEBHOOK_URL_REFUSED"
        assert error["details"][0]["metadata"]["field"] == "url"
    assert (await person.http.get("webhook")).status_code == 404
