"""Ports of loopback for programs that must be told one."""

from __future__ import annotations

import socket


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listened on a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [taken.getsockname()[1] for taken in sockets]
    for taken in sockets:
        taken.close()
    return ports


def free_port() -> int:
    """Return a port that nobody listened on a moment ago."""
    return free_ports(1)[0]
