"""Asks the parts of the mesh whether they truly answer."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mesh.certificates import PRESENT, ROOTS
from scripts.local import postgresql
from scripts.local.layout import Layout, Process

# Straight to loopback, whatever proxy the user's environment names.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Health:
    """`answer` is `passing`, or says what is wrong; `address` is where it listens, as the registry knows it."""

    answer: str
    address: str = ""

    @property
    def passing(self) -> bool:
        return self.answer == "passing"


def status(url: str) -> int:
    """Return the HTTP status of a GET; 0 when nobody answers."""
    try:
        with _direct.open(url, timeout=SECONDS) as response:
            return int(response.status)
    except urllib.error.HTTPError as answer:
        return answer.code
    except (OSError, ValueError):
        return 0


def ready(layout: Layout) -> bool:
    """Tell whether the edge answers, and every service behind it."""
    return status(f"{layout.edge_url}/readyz") == 200


def edge_epoch(layout: Layout) -> int:
    """Return which Envoy since the edge's start serves, from 0 on; -1 when none does."""
    info = _json(f"http://127.0.0.1:{layout.envoy_admin_port}/server_info")
    return int(info["command_line_options"]["restart_epoch"]) if info and info["state"] == "LIVE" else -1


def edge_is_certified(layout: Layout) -> bool:
    """Tell whether Envoy can be started: it does not wait for its certificate."""
    return (layout.edge_identity / PRESENT / ROOTS).exists()


def of_all(layout: Layout, processes: list[Process]) -> dict[str, Health]:
    """Return the health of each program by name."""
    registry = _registry(layout)
    own: dict[str, Callable[[], str]] = {
        "epmd": lambda: _connects(layout.epmd_port),
        "consul": lambda: "passing" if _json(f"{layout.consul_url}/v1/status/leader") else "has no leader",
        "rabbitmq": lambda: _broker(layout.broker_port),
        "postgresql": lambda: postgresql.answer(
            layout.postgresql_port, (layout.secrets / "postgresql").read_text().strip()
        ),
        "envoy": lambda: _edge(layout),
        "registrar": lambda: "passing" if registry else "Consul does not know our tokens",
        "edge-certificates": lambda: "passing" if edge_is_certified(layout) else "has no certificate",
    }
    found = {}
    for process in processes:
        if process.name in own:
            found[process.name] = Health(own[process.name](), process.address)
        else:
            known = registry.get(process.name, Health("not in the registry"))
            found[process.name] = Health(known.answer, process.address or known.address)
    return found


def _edge(layout: Layout) -> str:
    answer = status(f"{layout.edge_url}/readyz")
    return "passing" if answer == 200 else f"/readyz answers {answer}" if answer else "does not answer"


def _registry(layout: Layout) -> dict[str, Health]:
    path = layout.secrets / "consul.operator"
    token = path.read_text() if path.exists() else ""
    services = _json(f"{layout.consul_url}/v1/agent/services", token) or {}
    checks = _json(f"{layout.consul_url}/v1/agent/checks", token) or {}
    answers: dict[str, str] = {}
    for check in checks.values():
        if answers.get(check["ServiceID"], "passing") == "passing":  # the worst of several counts
            answers[check["ServiceID"]] = check["Status"]
    found = {
        name: Health(answers.get(name, "not checked"), f"{service['Address']}:{service['Port']}")
        for name, service in services.items()
    }
    for name, http in list(found.items()):  # `storage-1-http` is the second listener of `storage-1`
        owner = found.get(name.removesuffix("-http"))
        if name.endswith("-http") and owner:
            answer = owner.answer if http.passing else http.answer
            found[name.removesuffix("-http")] = Health(answer, f"{owner.address}, http {http.address}")
    return found


def _json(url: str, token: str = "") -> Any:
    request = urllib.request.Request(url, headers={"X-Consul-Token": token})  # noqa: S310 - our own loopback URL
    try:
        with _direct.open(request, timeout=SECONDS) as response:
            return json.load(response)
    except (OSError, ValueError):
        return None


def _connects(port: int) -> str:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS):
            return "passing"
    except OSError as error:
        return str(error.strerror or error)


def _broker(port: int) -> str:
    """Greet in AMQP 0-9-1: a broker that is up answers with a method frame (1), Connection.Start."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
            connection.settimeout(SECONDS)
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return "passing" if connection.recv(1) == b"\x01" else "does not speak AMQP"
    except OSError as error:
        return str(error.strerror or error)
