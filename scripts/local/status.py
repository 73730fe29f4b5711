"""Shows how the mesh fares. Run by `scripts/status`."""

from __future__ import annotations

import argparse
import json
import os

from scripts.local import display, health
from scripts.local.display import console
from scripts.local.layout import Layout, processes
from scripts.local.programs import Supervisor


def main(arguments: argparse.Namespace) -> int:
    mesh = Layout.from_environment(os.environ)
    supervisor = Supervisor(mesh)
    found = display.rows(mesh, processes(mesh, {}, consul="", rabbitmq=""), supervisor) if supervisor.pid() else []
    well = bool(found) and all(row.well for row in found)
    if arguments.json:
        print(json.dumps(display.as_json(mesh, found), indent=2))
    elif not found:
        console.print("The mesh is not running. scripts/up starts it.")
    else:
        display.print_table(found)
        answers = health.ready(mesh)
        console.print(f"The edge {'answers' if answers else '[red]is not ready[/red]'} at [bold]{mesh.edge_url}[/bold]")
        for row in found:
            if not row.well:
                display.print_tail(mesh, row.name)
    return 0 if well else 1


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="scripts/status", add_help=False)  # the script itself answers --help
    described.add_argument("--json", action="store_true", help="print one JSON object instead")
    return described


if __name__ == "__main__":
    display.run(main, parser())
