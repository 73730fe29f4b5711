"""Processes on this machine: supervisord and what it runs, who holds a port, what an earlier mesh left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import psutil
from supervisor.xmlrpc import SupervisorTransport

from scripts.local.layout import BIN, MARKER, ROOT, Layout

RUNNING = ("STARTING", "RUNNING")


class CannotStart(Exception):
    """The mesh cannot be started or stopped; the text says why and what to do."""


class SupervisorGone(CannotStart):
    """supervisord does not answer."""


@dataclass(frozen=True, slots=True)
class State:
    """What supervisord knows of one program; `pid` is 0 when it does not run."""

    name: str
    state: str
    pid: int
    start_time: float
    description: str


class Supervisor:
    """Talks to the mesh's supervisord over its socket."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._transport = SupervisorTransport(None, None, f"unix://{layout.socket}")
        # The transport decides where to; an address is required but not used.
        self._remote: Any = ServerProxy("http://127.0.0.1", transport=self._transport).supervisor

    def pid(self) -> int | None:
        """Return the process id of a supervisord that answers."""
        try:
            return int(self._call("getPID"))
        except SupervisorGone:
            return None

    def _call(self, method: str, *arguments: object) -> Any:
        try:
            return getattr(self._remote, method)(*arguments)
        except (OSError, HTTPException):
            self._transport.close()  # it keeps a connection that never was
            raise SupervisorGone(
                f"supervisord does not answer; {self._layout.logs}/supervisord.log may say why. scripts/up starts anew."
            ) from None

    def launch(self, config: Path) -> None:
        """Start supervisord as a daemon; it starts nothing by itself."""
        (self._layout.logs / "supervisord.log").unlink(missing_ok=True)  # restarts are counted in it
        command: list[str | Path] = [BIN / "supervisord", "-c", config]
        environment = {**os.environ, **self._layout.marker}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CannotStart(f"supervisord did not start:\n{done.stdout}{done.stderr}")
        if not _until(lambda: self.pid() is not None, within_seconds=10):
            raise CannotStart(f"supervisord does not answer; see {self._layout.logs}/supervisord.log")

    def states(self) -> dict[str, State]:
        return {
            each["name"]: State(
                name=each["name"],
                state=each["statename"],
                pid=each["pid"],
                start_time=each["start"],
                description=each["spawnerr"] or each["description"],
            )
            for each in self._call("getAllProcessInfo")
        }

    def changes(self) -> tuple[list[str], list[str], list[str]]:
        """Read the configuration again; return the names (added, changed, removed)."""
        added, changed, removed = self._call("reloadConfig")[0]
        return added, changed, removed

    def start(self, names: Iterable[str]) -> None:
        """Begin to start programs, all at once; those that run already are left alone."""
        for name in names:
            with contextlib.suppress(Fault):
                self._call("startProcess", name, False)

    def stop(self, names: Iterable[str]) -> None:
        """Ask programs to end, all at once, and wait until they have."""
        waiting = set(names)
        for name in waiting:
            with contextlib.suppress(Fault):
                self._call("stopProcess", name, False)

        def ended() -> bool:
            states = self.states()
            return not any(states[name].pid for name in waiting if name in states)

        _until(ended, within_seconds=60)  # supervisord kills what is slower than its stopwaitsecs

    def signal(self, name: str, signal: str) -> None:
        """Send a signal, e.g. `HUP`, to a program that runs."""
        self._call("signalProcess", name, signal)

    def add(self, names: Iterable[str]) -> None:
        for name in names:
            self._call("addProcessGroup", name)

    def remove(self, names: Iterable[str]) -> None:
        """Forget stopped programs."""
        for name in names:
            self._call("removeProcessGroup", name)

    def shutdown(self) -> None:
        """End supervisord, whose programs have ended."""
        pid = self.pid()
        if pid is None:
            return
        with contextlib.suppress(SupervisorGone, Fault):
            self._call("shutdown")
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).wait(timeout=30)


@contextmanager
def alone(layout: Layout) -> Iterator[None]:
    """Hold the right to change this mesh.

    Raises:
        CannotStart: another `up` or `down` is at work.
    """
    with (layout.socket.parent / "changing").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotStart("Another scripts/up or scripts/down is at work on this mesh; wait for it.") from None
        yield


def _until(check: Callable[[], bool], *, within_seconds: float) -> bool:
    end = time.monotonic() + within_seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.1)
    return check()


def restarts(layout: Layout) -> dict[str, int]:
    """Return how often each program died by itself since supervisord started."""
    counts: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (layout.logs / "supervisord.log").read_text(errors="replace").splitlines():
            _, found, rest = line.partition(" exited: ")
            if found:
                name = rest.split(" ", 1)[0]
                counts[name] = counts.get(name, 0) + 1
    return counts


def leftovers(layout: Layout) -> list[psutil.Process]:
    """Return the living processes that a supervisord of this mesh started, or that is one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARKER) == str(layout.var) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end(processes: list[psutil.Process], *, patience_seconds: float = 5) -> None:
    """Ask processes to end, and end those that do not."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, stubborn = psutil.wait_procs(processes, timeout=patience_seconds)
    for process in stubborn:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(stubborn, timeout=5)


def require_free(layout: Layout) -> None:
    """Check that the mesh can have its ports, or has them already.

    Raises:
        CannotStart: somebody else has one; tells who, and how to move.
    """
    taken = [port for port in layout.fixed_ports if _is_taken(port)]
    if taken:
        ours = {process.pid for process in leftovers(layout)}
        pids = _listeners()
        strangers = {port: _described(port, pids.get(port)) for port in taken if pids.get(port) not in ours}
        if strangers:
            raise CannotStart(conflict(layout.fixed_ports, strangers))


def conflict(ports: Mapping[int, str], holders: Mapping[int, str]) -> str:
    """Return the sentence about taken ports."""
    lines = [f"  {port} (wanted for {ports[port]}) is held by {holder}" for port, holder in sorted(holders.items())]
    only_edge = all(ports[port] == "the edge" for port in holders)
    advice = (
        "ATELIER_EDGE_PORT=8081 scripts/up"
        if only_edge
        else "ATELIER_PORT_BASE=18000 ATELIER_EDGE_PORT=8081 scripts/up"
    )
    return "\n".join(
        [
            "Ports are taken; nothing was started:",
            *lines,
            "End that program, or move the mesh, for example:",
            f"    {advice}",
        ]
    )


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection's remains are nobody's listener
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _listeners() -> dict[int, int]:
    """Return the process ids by the ports on which they listen, as far as this user may know them."""
    return {
        connection.laddr.port: connection.pid
        for connection in psutil.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.pid
    }


def _described(port: int, pid: int | None) -> str:
    with contextlib.suppress(psutil.Error):
        if pid:
            process = psutil.Process(pid)
            return f"process {pid}: {' '.join(process.cmdline())[:120] or process.name()}"
    return f"another user's process (an administrator sees it by: ss -ltnp 'sport = :{port}')"


def children(pid: int) -> list[int]:
    """Return the process ids of what a process has started and that still runs."""
    with contextlib.suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children()]
    return []


def memory_bytes(pid: int) -> int:
    """Return the proportional memory (PSS) of a process and its children; 0 when it is gone."""
    total = 0
    for process in _family(pid):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


def _family(pid: int) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        yield process
        yield from process.children(recursive=True)
