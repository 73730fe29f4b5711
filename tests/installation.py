"""A private installation of the real mesh, started and stopped by our scripts: for system tests and benchmarks."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.local.layout import SPAN, Layout

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mesh:
    """A running installation."""

    url: str
    var: Path
    environment: dict[str, str]
    root: Path = ROOT
    """The checkout whose scripts started it."""

    def script(self, name: str, *arguments: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """Run one of scripts/ on this installation."""
        return subprocess.run(
            [self.root / "scripts" / name, *arguments],
            env=self.environment, capture_output=True, text=True, timeout=timeout, check=False, cwd=self.root,
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        """Return what `scripts/status --json` says."""
        return json.loads(self.script("status", "--json").stdout)

    def pids(self, service: str) -> dict[str, int]:
        """Return the process id of each running instance of a service, by its name."""
        return {
            process["name"]: process["pid"]
            for process in self.status()["processes"]
            if process["name"].rpartition("-")[0] == service and process["pid"]
        }

    def pid(self, name: str) -> int:
        """Return the process id of what `scripts/status` calls `name`."""
        return next(process["pid"] for process in self.status()["processes"] if process["name"] == name)

    def atelier(self, *arguments: str, home: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run the command as a person with the home folder `home` would."""
        return subprocess.run(
            [self.root / ".venv" / "bin" / "atelier", "--server", self.url, *arguments],
            env={**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home / ".config"), "NO_COLOR": "1"},
            input=stdin, capture_output=True, text=True, timeout=120, check=False, cwd=home,
        )  # fmt: skip

    def secret(self, name: str) -> str:
        """Return one of the installation's secrets."""
        return (self.var / "secrets" / name).read_text().strip()


@contextmanager
def running(
    var: Path, *arguments: str, replicas: int = 1, settings: dict[str, str] | None = None, root: Path = ROOT
) -> Iterator[Mesh]:
    """Hold a mesh whose state is in `var`, on ports that nobody has; everything of it is deleted at the end.

    `arguments` are of scripts/up.
    """
    with _on_free_ports(var, replicas) as layout:
        environment = {
            **os.environ,
            "ATELIER_VAR": str(var),
            "ATELIER_PORT_BASE": str(layout.port_base),
            "ATELIER_EDGE_PORT": str(layout.edge_port),
            **(settings or {}),
        }
        mesh = Mesh(layout.edge_url, var, environment, root)
        up = mesh.script("up", "--replicas", str(replicas), *arguments)
        try:
            if up.returncode != 0:
                raise RuntimeError(up.stdout + up.stderr)
            yield mesh
        finally:
            mesh.script("down", "--erase", "--yes")


@contextmanager
def _on_free_ports(var: Path, replicas: int) -> Iterator[Layout]:
    """Hold a layout whose ports are free, and no other test's; below the ports that the kernel gives out by itself."""
    for base in random.sample(range(18_000, 32_000, SPAN + 1), k=19):
        layout = Layout(var=var, port_base=base, edge_port=base + SPAN, replicas=replicas)
        with socket.socket(socket.AF_UNIX) as claim:
            try:
                claim.bind(f"\0atelier-tests-{base}")  # a mesh takes a while until it listens
                for port in layout.fixed_ports:
                    socket.create_server(("127.0.0.1", port)).close()
            except OSError:
                continue
            yield layout
            return
    raise RuntimeError("no block of ports is free: stop what runs here (scripts/down)")
