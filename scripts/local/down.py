"""Stops the mesh, and nothing else. Run by `scripts/down`."""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from scripts.local import display, programs
from scripts.local.display import console
from scripts.local.layout import Layout, processes
from scripts.local.programs import Supervisor


def main(arguments: argparse.Namespace) -> int:
    mesh = Layout.from_environment(os.environ)
    present = [folder for folder in mesh.state_folders if folder.exists()]
    if not present:
        console.print(f"There is no mesh in {mesh.var}; nothing to stop.", markup=False)
        return 0
    if arguments.erase and not arguments.yes:
        console.print("This will delete every account, file, task, secret and log of this mesh:", style="bold")
        console.print("\n".join(f"    {folder}" for folder in present), markup=False)
        if not sys.stdin.isatty():
            console.print("Say --yes to do it without being asked. Nothing was changed.")
            return 1
        if input("Delete them? [y/N] ").strip().lower() not in ("y", "yes"):
            console.print("Nothing was changed.")
            return 1
    mesh.socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with programs.alone(mesh):
        stopped = stop_all(mesh, Supervisor(mesh))
        console.print(f"Stopped {stopped} processes." if stopped else "Nothing was running.")
        if arguments.erase:
            for folder in present:
                shutil.rmtree(folder)
            console.print(f"Deleted {', '.join(folder.name for folder in present)} in {mesh.var}.", markup=False)
    return 0


def stop_all(mesh: Layout, supervisor: Supervisor) -> int:
    """End every process of a mesh, what is used last first; return how many there were."""
    count = len(programs.leftovers(mesh))
    if supervisor.pid():
        wanted = processes(mesh, {}, consul="", rabbitmq="")
        # The edge first, so that nothing new comes in; then services drain while brokers still serve them.
        for wave in sorted({process.wave for process in wanted}, reverse=True):
            names = [process.name for process in wanted if process.wave == wave]
            with console.status(f"Stopping {', '.join(names)} …"):
                supervisor.stop(names)
    supervisor.shutdown()
    programs.end(programs.leftovers(mesh))
    return count


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="scripts/down", add_help=False)  # the script itself answers --help
    described.add_argument("--erase", action="store_true", help="also delete the mesh's state, after asking")
    described.add_argument("--yes", action="store_true", help="do not ask")
    return described


if __name__ == "__main__":
    display.run(main, parser())
