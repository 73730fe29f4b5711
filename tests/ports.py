"""Ports of loopback for programs that must be told one."""

from __future__ import annotations

import random
import socket

# Below those that the kernel gives to whoever connects or asks for any: such a one may be gone before it is used, or
# while its program is being restarted. Beside those of whole meshes (tests/installation.py).
PORTS = range(10_000, 17_000)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listened on a moment ago."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"there are not {count} free ports in {PORTS}")


def free_port() -> int:
    """Return a port that nobody listened on a moment ago."""
    return free_ports(1)[0]
