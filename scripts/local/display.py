"""What `up`, `down` and `status` print, and how they end."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from scripts.local import health, programs
from scripts.local.install import CannotInstall
from scripts.local.layout import Layout, Process, SettingRefused

# Where nobody watches, a table is not folded to the 80 columns of a terminal that is not there.
console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 200)


@dataclass(frozen=True, slots=True)
class Row:
    """One program as `scripts/status` shows it; `memory_bytes` is proportional (PSS) and includes its children."""

    name: str
    state: str
    health: str
    address: str
    pid: int
    memory_bytes: int
    uptime_seconds: int
    restarts: int

    @property
    def well(self) -> bool:
        return self.state in programs.RUNNING and self.health == "passing"


def run(main: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser) -> None:
    """Run a script's main function; a refusal is a sentence, not a trace."""
    try:
        sys.exit(main(parser.parse_args()))
    except (SettingRefused, programs.CannotStart, CannotInstall) as reason:
        console.print(f"\n{reason}", style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("\nInterrupted. `scripts/status` shows how things stand, `scripts/down` stops all.")
        sys.exit(130)


def rows(mesh: Layout, processes: list[Process], supervisor: programs.Supervisor) -> list[Row]:
    """Return how each program fares."""
    states, restarts = supervisor.states(), programs.restarts(mesh)
    answers = health.of_all(mesh, processes)
    found = []
    for process in processes:
        state = states.get(process.name)
        if state:
            found.append(
                Row(
                    name=process.name,
                    state=state.state,
                    health=answers[process.name].answer if state.pid else state.description,
                    address=answers[process.name].address,
                    pid=state.pid,
                    memory_bytes=programs.memory_bytes(state.pid) if state.pid else 0,
                    uptime_seconds=int(time.time() - state.start_time) if state.pid else 0,
                    restarts=restarts.get(process.name, 0),
                )
            )
    return found


def as_json(mesh: Layout, found: list[Row]) -> dict[str, object]:
    return {
        "running": bool(found),
        "ready": bool(found) and health.ready(mesh),
        "edge": mesh.edge_url,
        "memory_bytes": sum(row.memory_bytes for row in found),
        "processes": [asdict(row) for row in found],
    }


def print_table(found: list[Row]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("program", "state", "health", "address", "pid"):
        table.add_column(title, no_wrap=True)
    for title in ("memory", "uptime", "restarts"):
        table.add_column(title, no_wrap=True, justify="right")
    for row in found:
        table.add_row(
            row.name,
            row.state.lower(),
            row.health,
            row.address,
            str(row.pid or ""),
            f"{row.memory_bytes / 2**20:.0f} MiB" if row.memory_bytes else "",
            duration(row.uptime_seconds) if row.pid else "",
            str(row.restarts),
            style="" if row.well else "red",
        )
    Console(width=max(console.width, 120)).print(table)  # a narrow terminal wraps it, rather than cut addresses short
    console.print(f"{len(found)} programs, {sum(row.memory_bytes for row in found) / 2**20:.0f} MiB in all (PSS)")


def duration(seconds: int) -> str:
    """Return a duration in its two largest units."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    if hours:
        return f"{hours} h {minute} min"
    return f"{minute} min {second} s" if minutes else f"{second} s"


def tail(mesh: Layout, name: str, lines: int = 15) -> str:
    """Return the end of a program's log."""
    try:
        with (mesh.logs / f"{name}.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 20_000))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return ""


def print_tail(mesh: Layout, name: str) -> None:
    console.print(f"\nThe end of {mesh.logs}/{name}.log:", style="bold", markup=False)
    console.print(tail(mesh, name) or "(it is empty)", style="dim", markup=False)
