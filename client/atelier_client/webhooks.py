"""The commands of `atelier webhook`: where one hears of one's tasks, and whether it arrived."""

from __future__ import annotations

import click
from atelier.task.v1.webhook_pb2 import Webhook, WebhookDelivery

from atelier_client.client import Atelier
from atelier_client.shell import Group, Shell, connected, document, limit_option, local_time, table


@click.group(cls=Group)
def webhook() -> None:
    """Have a server of yours told when tasks end."""


@webhook.command("set")
@click.argument("receiver", metavar="URL")  # `url` is the server's
@connected
async def set_url(shell: Shell, atelier: Atelier, receiver: str) -> None:
    """Name the URL that hears of all your tasks."""
    _answer(shell, await atelier.set_webhook(receiver))


@webhook.command()
@connected
async def show(shell: Shell, atelier: Atelier) -> None:
    """Show the URL, and the secret that requests are signed with."""
    _answer(shell, await atelier.webhook())


@webhook.command()
@connected
async def delete(shell: Shell, atelier: Atelier) -> None:
    """Forget the URL; what is still owed to it is given up, unless another is set before its next try."""
    await atelier.delete_webhook()
    shell.answer({"deleted": True}, "No URL hears of your tasks any more, but for those that name their own.")


@webhook.command()
@connected
async def rotate_secret(shell: Shell, atelier: Atelier) -> None:
    """Make a new secret. For a day the one before signs as well."""
    _answer(shell, await atelier.rotate_webhook_secret())


@webhook.command()
@click.option("--task", "task_id", metavar="TASK_ID", default="", help="Only those of this task.")
@limit_option
@connected
async def deliveries(shell: Shell, atelier: Atelier, task_id: str, limit: int) -> None:
    """List what was, is or will be sent, newest first."""
    found: list[WebhookDelivery] = []
    async for delivery in atelier.webhook_deliveries(task_id=task_id):
        found.append(delivery)
        if len(found) == limit:
            break
    rows = table("DELIVERY", "TASK", "EVENT", "STATE", "ATTEMPTS", "STATUS", "FAILURE", "NEXT")
    for each in found:
        rows.add_row(
            each.delivery_id, each.task_id, each.event_type.rpartition(".")[2], _state(each), str(each.attempts),
            str(each.status or ""), each.failure,
            local_time(each.next_attempt_time) if each.HasField("next_attempt_time") else "",
        )  # fmt: skip
    shell.answer({"deliveries": [document(each) for each in found]}, rows if found else "No deliveries.")


@webhook.command()
@click.argument("delivery_id")
@connected
async def resend(shell: Shell, atelier: Atelier, delivery_id: str) -> None:
    """Send a delivery again, at once and then for a day."""
    delivery = await atelier.resend_webhook_delivery(delivery_id)
    shell.answer({"delivery": document(delivery)}, f"{delivery.delivery_id} is {_state(delivery)}.")


def _answer(shell: Shell, found: Webhook) -> None:
    text = f"{found.url or 'Only tasks name URLs.'}\nsecret {found.secret}"
    shell.answer({"webhook": document(found)}, text)


def _state(delivery: WebhookDelivery) -> str:
    return WebhookDelivery.State.Name(delivery.state).removeprefix("STATE_").lower()
