"""What happens to the mesh: processes are killed or hang, connections are cut. Chosen by a seed, done for real."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import psutil

from scripts.local.layout import Layout
from scripts.local.programs import Supervisor

SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 3.0
HANGS_SECONDS = 8.0  # longer than health checks wait, shorter than a lease

_PIDFD_GETFD = 438  # the system call, on every architecture


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that happens to one process."""

    after_seconds: float
    what: str
    service: str

    def __str__(self) -> str:
        return f"{self.what} {self.service}"


KINDS = {"kill": 6, "hang": 1, "cut": 3}
SERVICES = {
    "task": 4,
    "media-worker": 4,
    "user": 2,
    "storage": 2,
    "control": 2,
    "auth": 1,
    "media": 1,
    "envoy": 1,
    "consul": 1,
    "rabbitmq": 2,
    "postgresql": 2,
}


def planned(seed: int) -> Iterator[Fault]:
    """Yield faults without end; the same ones for the same seed."""
    choice = random.Random(seed)
    while True:
        yield Fault(
            choice.uniform(SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS),
            choice.choices(list(KINDS), list(KINDS.values()))[0],
            choice.choices(list(SERVICES), list(SERVICES.values()))[0],
        )


class Chaos:
    """Does faults to a running mesh. Whatever hangs goes on in the end."""

    def __init__(self, layout: Layout, *, seed: int) -> None:
        self._supervisor = Supervisor(layout)
        self._choice = random.Random(f"{seed}/which")
        self._hanging: set[asyncio.Task[None]] = set()
        self._ways: dict[str, Callable[[int], None]] = {
            "kill": lambda pid: os.kill(pid, signal.SIGKILL),
            "hang": self._hang,
            "cut": self._cut,
        }

    def do(self, fault: Fault) -> bool:
        """Do one fault to one instance; False when there is none to do it to now."""
        running = [
            state.pid
            for name, state in sorted(self._supervisor.states().items())
            if state.pid and state.state == "RUNNING" and fault.service in {name, name.rpartition("-")[0]}
        ]
        if not running:
            return False
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            self._ways[fault.what](self._choice.choice(running))
        return True

    async def settled(self) -> None:
        """Wait until what hangs goes on."""
        if self._hanging:
            await asyncio.wait(self._hanging)

    def _hang(self, pid: int) -> None:
        async def hang() -> None:
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(HANGS_SECONDS)
            finally:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

        task = asyncio.create_task(hang())
        self._hanging.add(task)
        task.add_done_callback(self._hanging.discard)

    def _cut(self, pid: int) -> None:
        """End a few of a process's connections under it, as a network that drops them does."""
        open_ = [
            each.fd
            for each in psutil.Process(pid).net_connections("tcp")
            if each.status == psutil.CONN_ESTABLISHED and each.fd >= 0
        ]
        for descriptor in self._choice.sample(open_, k=min(len(open_), 3)):
            with suppress(OSError):  # closed meanwhile
                _shut(pid, descriptor)


def _shut(pid: int, descriptor: int) -> None:
    process = os.pidfd_open(pid)
    try:
        own = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, descriptor, 0)
        if own < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
    finally:
        os.close(process)
    with socket.socket(fileno=own) as connection:
        connection.shutdown(socket.SHUT_RDWR)
