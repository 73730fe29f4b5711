"""Restarts programs of a running mesh so that the rest goes on. Run by `scripts/restart`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

from scripts.local import display, health, programs
from scripts.local.display import console
from scripts.local.layout import Layout, Process, processes
from scripts.local.programs import CannotStart, Supervisor
from scripts.local.up import batches, wait, wait_until_passing, wait_until_ready

NOT_OURS = ("epmd", "consul", "rabbitmq", "postgresql")  # there is one of each: restarted only when asked for
EDGE = "envoy"


def main(arguments: argparse.Namespace) -> int:
    mesh = Layout.from_environment(os.environ)
    mesh.socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with programs.alone(mesh):
        supervisor = Supervisor(mesh)
        if supervisor.pid() is None:
            raise CannotStart("The mesh is not running; scripts/up starts it.")
        present = processes(mesh, {}, consul="", rabbitmq="")
        chosen = in_turn(selected(present, arguments.names))
        began = time.monotonic()
        if not arguments.names:  # what is not well already is no time to take down its replica
            wait_until_ready(mesh, supervisor, present, programs.restarts(mesh))
        for number, process in enumerate(chosen, start=1):
            console.print(f"{number}/{len(chosen)}  {process.name} …", markup=False)
            restart(mesh, supervisor, process)
        console.print(f"Restarted {len(chosen)} programs ({time.monotonic() - began:.1f} s).")
    return 0


def selected(present: Sequence[Process], names: Sequence[str]) -> list[Process]:
    """Return the programs that are meant by `names`.

    Raises:
        CannotStart: one of the names means none.
    """

    def called(process: Process, name: str) -> bool:
        stem, _, number = process.name.rpartition("-")
        return name == process.name or (number.isdecimal() and name == stem)

    for name in names:
        if not any(called(process, name) for process in present):
            known = ", ".join(process.name for process in present)
            raise CannotStart(f"There is no program {name}. There are: {known}.")
    if not names:
        return [process for process in present if process.name not in NOT_OURS]
    return [process for process in present if any(called(process, name) for name in names)]


def in_turn(chosen: Sequence[Process]) -> list[Process]:
    """Return the order: as at a start, and of each service one replica long after the other."""
    return [process for batch in batches(chosen) for process in batch]


def restart(mesh: Layout, supervisor: Supervisor, process: Process) -> None:
    """Restart a program and wait until it is well.

    Raises:
        CannotStart: it died or is not well in time.
    """
    before = programs.restarts(mesh)
    if process.name == EDGE:
        replace_edge(mesh, supervisor, process)
    else:
        supervisor.stop([process.name])
        supervisor.start([process.name])
    wait_until_passing(mesh, supervisor, [process], before)


def replace_edge(mesh: Layout, supervisor: Supervisor, process: Process) -> None:
    """Have another Envoy take over, and wait until the one before has finished."""
    before, epoch = programs.restarts(mesh), health.edge_epoch(mesh)
    runner = supervisor.states()[process.name].pid

    def replaced() -> bool:
        return health.edge_epoch(mesh) == epoch + 1 and len(programs.children(runner)) == 1

    supervisor.signal(process.name, "HUP")
    wait(mesh, supervisor, [process], before, replaced)


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="scripts/restart", add_help=False)  # the script itself answers --help
    described.add_argument("names", nargs="*", metavar="NAME")
    return described


if __name__ == "__main__":
    display.run(main, parser())
