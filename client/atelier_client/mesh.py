"""`atelier mesh`: what runs, why a service is called as it is, and which settings are in force."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator

import click
from atelier.mesh.v1.topology_pb2 import Client, GetTopologyResponse, Instance, Service
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Group as Rows
from rich.console import RenderableType

from atelier_client.client import Atelier
from atelier_client.errors import NotFound
from atelier_client.shell import Group, Shell, connected, document, table

ENDPOINTS = "ClusterLoadAssignment"


@click.group(cls=Group)
def mesh() -> None:
    """Look at the mesh: what runs, what is why, what is set. For administrators."""


@mesh.command()
@connected
async def status(shell: Shell, atelier: Atelier) -> None:
    """Show services, instances, versions, health, and who calls whom."""
    found = await atelier.topology()
    instances = table("service", "instance", "address", "version", "zone", "health", "since", "says of itself")
    for service, each in _instances(found.services):
        said = _capacity(each) if each.health == Instance.HEALTH_PASSING else _short(each.check_output)
        instances.add_row(
            service.name, each.instance_id, each.address, each.version, each.zone or "-", _health(each),
            _ago(each.since_time), said,
        )  # fmt: skip
    clients = table("follows", "control plane", "zone", "since", "types", "refused")
    for client in found.clients:
        refused = [f"{each.type}: {each.refusal}" for each in client.subscriptions if each.refusal]
        clients.add_row(
            client.node_id, client.control_plane, client.zone or "-", _ago(client.connect_time),
            str(len(client.subscriptions)), _short("; ".join(refused)),
        )  # fmt: skip
    calls = table("caller", "may call", "denied by an intention")
    for caller in dict.fromkeys(each.caller for each in found.permissions):
        own = [each for each in found.permissions if each.caller == caller]
        calls.add_row(
            caller,
            ", ".join(f"{each.callee} ({len(each.methods)})" for each in own if not each.denied),
            ", ".join(each.callee for each in own if each.denied),
        )
    shell.answer(document(found), Rows(instances, "", clients, "", calls, *_remarks(found)))


@mesh.command()
@click.argument("service")
@connected
async def why(shell: Shell, atelier: Atelier, service: str) -> None:
    """Show of SERVICE who registered each endpoint, which check says what, and who has heard of it."""
    found = await _of(atelier, service)
    endpoints = table("instance", "address", "health", "since", "registered by", "gets calls", "its check says")
    for _, each in _instances(found.services):
        endpoints.add_row(
            each.instance_id, each.address, _health(each), _ago(each.since_time),
            f"process {each.process or '?'}, agent {each.agent}",
            "yes" if each.health == Instance.HEALTH_PASSING else "no", _short(each.check_output),
        )  # fmt: skip
    heard = table("client", "control plane", "what", "has", "newest", "")
    for client in found.clients:
        for what, has, newest, state in _held(client):
            heard.add_row(client.node_id, client.control_plane, what, has, newest, state)
    calls = table("caller", "callee", "may call", "")
    for permission in found.permissions:
        calls.add_row(
            permission.caller, permission.callee, ", ".join(name.rpartition("/")[2] for name in permission.methods),
            "denied by an intention" if permission.denied else "",
        )  # fmt: skip
    shell.answer(document(found), Rows(endpoints, "", heard, "", calls, *_remarks(found)))


@mesh.command()
@click.argument("service", required=False, default="")
@connected
async def config(shell: Shell, atelier: Atelier, service: str) -> None:
    """Show which settings are in force that may change while services run, and what was refused.

    They are set in Consul (docs/operating.md): consul kv put config/SERVICE '{"log_level": "DEBUG"}'
    """
    found = await _of(atelier, service) if service else await atelier.topology()
    rows = table("instance", "setting", "value", "refused")
    answer = []
    for _, each in _instances(found.services):
        if not each.settings or each.instance_id.endswith("-http"):
            continue
        settings = _object(each.settings)
        answer.append({"instanceId": each.instance_id, "settings": settings, "refusal": each.settings_refusal})
        name, refusal = each.instance_id, each.settings_refusal
        for setting, value in settings.items():
            rows.add_row(name, setting, json.dumps(value), refusal)
            name, refusal = "", ""
    shell.answer({"instances": answer}, Rows(rows, *_remarks(found)))


async def _of(atelier: Atelier, service: str) -> GetTopologyResponse:
    found = await atelier.topology(service)
    if not found.services:
        raise NotFound(
            f"{service} is not in the registry; atelier mesh status lists what is.", reason="SERVICE_UNKNOWN"
        )
    return found


def _instances(services: Iterable[Service]) -> Iterator[tuple[Service, Instance]]:
    return ((service, each) for service in services for each in service.instances)


def _held(client: Client) -> Iterator[tuple[str, str, str, str]]:
    """Yield what a client has of the service: what, its version, the newest version, and what that means."""
    for subscription in client.subscriptions:
        for resource in subscription.resources:
            what = "endpoints" if subscription.type == ENDPOINTS else subscription.type
            if subscription.refusal:
                state = f"refused: {_short(subscription.refusal)}"
            else:
                state = "newest" if resource.acknowledged_version == resource.present_version else "waiting"
            yield f"{what} {resource.name}", resource.acknowledged_version or "-", resource.present_version, state


def _remarks(found: GetTopologyResponse) -> list[RenderableType]:
    remarks = []
    for _, instance in _instances(found.services):
        if instance.degradation:
            remarks.append(f"Degraded: {instance.instance_id}. {instance.degradation}")
    for service in found.services:
        if service.fault:
            remarks.append(f"A fault is injected into {service.name}: {service.fault}")
        if service.fault_refusal:
            remarks.append(f"faults/{service.name} is refused: {service.fault_refusal}")
    if found.stale:
        remarks.append("Consul is away, or has just come back: instances are as they were last known.")
    if found.silent_control_planes:
        remarks.append(
            f"Clients are missing of control planes that do not answer: {', '.join(found.silent_control_planes)}."
        )
    return ["", *remarks] if remarks else []


def _health(instance: Instance) -> str:
    return Instance.Health.Name(instance.health).removeprefix("HEALTH_").lower()


def _ago(stamp: Timestamp) -> str:
    """Return how long ago that was, in its largest unit."""
    seconds = max(0, int(time.time() - stamp.seconds))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _capacity(instance: Instance) -> str:
    said = _object(instance.capacity) if instance.capacity else {}
    return "; ".join(
        f"{name}: {', '.join(map(str, value)) or '-' if isinstance(value, list) else value}"
        for name, value in said.items()
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:79]}…"


def _object(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError:  # too long for the registry, which cut it
        found = None
    return found if isinstance(found, dict) else {"settings": text}
