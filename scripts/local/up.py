"""Starts the mesh, or brings a running one to what it should be. Run by `scripts/up`, which installs first."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from scripts.local import configs, display, health, install, layout, postgresql, programs
from scripts.local.display import console
from scripts.local.down import stop_all
from scripts.local.layout import BIN, DATABASES, ROOT, Layout, Process
from scripts.local.programs import CannotStart, Supervisor

READY_SECONDS = 90
ROOM_BYTES = 300_000_000  # RabbitMQ takes no message below 50 MB; logs, blobs and databases grow
FIRST_WAVES = (0, 1)  # what may run before the databases are migrated: brokers and control plane


def main(arguments: argparse.Namespace) -> int:
    asked = {"ATELIER_DATABASE": layout.POSTGRESQL} if arguments.postgres else {}
    mesh = Layout.from_environment({**os.environ, **asked})
    require_databases(mesh)
    configs.make_folders(mesh)
    with programs.alone(mesh):
        supervisor = Supervisor(mesh)
        mesh = replace(mesh, replicas=arguments.replicas or mesh.replicas)
        environment, wanted = desired(mesh)
        began = time.monotonic()
        if supervisor.pid():
            done = change(mesh, supervisor, wanted, environment)
        else:
            start(mesh, supervisor, wanted, environment)
            done = "The mesh is up"
        tell(mesh, supervisor, wanted, f"{done} ({time.monotonic() - began:.1f} s).")
    return 0


def require_databases(mesh: Layout) -> None:
    """Refuse to start a service on an empty database because its own, elsewhere, was not named again.

    Raises:
        CannotStart: one was named at the last start and is not now.
    """
    last = json.loads(mesh.last.read_text()) if mesh.last.exists() else {}
    forgotten = [name for name in last.get(layout.ELSEWHERE, "").split() if name not in mesh.elsewhere]
    if forgotten:
        names = ", ".join(f"{name.upper()}_DATABASE_URL" for name in forgotten)
        raise CannotStart(
            f"At the last start {names} said where the data is: say it again. To begin with an empty database instead, "
            f"delete {mesh.last}."
        )


def desired(mesh: Layout) -> tuple[dict[str, str], list[Process]]:
    """Write the settings of a mesh; return the services' environment and the programs that should run.

    Raises:
        CannotStart: Consul, RabbitMQ or PostgreSQL is missing, or the disk is full.
    """
    free = shutil.disk_usage(mesh.var).free
    if free < ROOM_BYTES:
        raise CannotStart(
            f"Not enough disk: {mesh.var} has {free / 1e6:.0f} MB free, the mesh needs {ROOM_BYTES / 1e6:.0f} MB."
        )
    consul, brokers = install.consul(), install.rabbitmq_servers()
    if consul is None or not brokers:
        raise CannotStart("Consul or RabbitMQ is missing; scripts/up installs them.")
    keys = configs.make_secrets(mesh)
    configs.write_all(mesh, keys, consul_version=consul_version(consul))
    databases: dict[str, str] = {}
    server: tuple[str, ...] = ()
    if mesh.database == layout.POSTGRESQL:
        databases, server = postgresql.urls(mesh, keys), own_postgresql(mesh, keys["postgresql"])
    environment = layout.mesh_environment(mesh, {**databases, **os.environ}, keys["broker"])
    wanted = layout.processes(mesh, environment, consul=consul, rabbitmq=brokers[-1], postgresql=server)
    prints = {process.name: configs.fingerprint(process.sources) for process in wanted}
    configs.write(mesh.configs / "supervisord.conf", configs.supervisord(mesh, wanted, prints))
    return environment, wanted


def own_postgresql(mesh: Layout, password: str) -> tuple[str, ...]:
    """Return what runs the mesh's own PostgreSQL, whose files are there afterwards.

    Raises:
        CannotStart: it is missing, or its user cannot get to the files.
    """
    written_by = mesh.postgresql / "PG_VERSION"  # no other version reads the files
    version = written_by.read_text().strip() if written_by.exists() else ""
    bin_folder = install.postgresql(version or "*")
    if bin_folder is None:
        raise CannotStart(f"PostgreSQL {version} is missing; scripts/up --postgres installs Debian's.")
    postgresql.initialise(bin_folder, mesh.postgresql, password)
    return postgresql.command(bin_folder, mesh.postgresql, mesh.postgresql_port)


def consul_version(program: str) -> tuple[int, int]:
    said = subprocess.run([program, "version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"v(\d+)\.(\d+)", said)
    if not found:
        raise CannotStart(f"{program} does not say which version it is; it should be Consul 1.8 or newer.")
    return int(found[1]), int(found[2])


def start(mesh: Layout, supervisor: Supervisor, wanted: list[Process], environment: Mapping[str, str]) -> None:
    """Start everything from nothing; if that fails, stop everything."""
    left = programs.leftovers(mesh)
    if left:
        console.print(f"Ending {len(left)} processes of an earlier mesh whose supervisor was killed …")
        programs.end(left)
    programs.require_free(mesh)
    configs.remember(mesh)
    console.print(f"Starting {len(wanted)} programs …")
    try:
        supervisor.launch(mesh.configs / "supervisord.conf")
        supervisor.start(process.name for process in wanted if process.wave in FIRST_WAVES)
        provide_databases(mesh, supervisor, wanted)
        migrate(environment)
        wait(mesh, supervisor, wanted, {}, lambda: health.edge_is_certified(mesh))
        supervisor.start(process.name for process in wanted if process.wave not in FIRST_WAVES)
        wait_until_ready(mesh, supervisor, wanted, before={})
    except BaseException:
        console.print("\nStopping what was started; the logs stay.")
        stop_all(mesh, supervisor)
        raise


def change(mesh: Layout, supervisor: Supervisor, wanted: list[Process], environment: Mapping[str, str]) -> str:
    """Bring a running mesh to what it should be, one replica after the other; return what was done."""
    programs.require_free(mesh)
    configs.remember(mesh)
    added, changed, removed = supervisor.changes()
    states = supervisor.states()
    idle = [name for name, each in states.items() if each.state not in programs.RUNNING]
    stopped = [name for name in idle if name not in (*changed, *removed)]
    if not (added or changed or removed or stopped):
        wait_until_ready(mesh, supervisor, wanted, before=programs.restarts(mesh))
        return "The mesh is up already; nothing was changed"
    # The running code stands the newer tables, so that migrating first needs no standstill.
    provide_databases(mesh, supervisor, wanted)
    migrate(environment)
    before = programs.restarts(mesh)
    supervisor.add(added)
    supervisor.stop(removed)
    supervisor.remove(removed)
    pending = {*added, *changed, *stopped}
    for batch in batches([process for process in wanted if process.name in pending]):
        names = [process.name for process in batch]
        console.print(f"Starting {', '.join(names)} …")
        renewed = [name for name in names if name in changed]
        supervisor.stop(renewed)
        supervisor.remove(renewed)
        supervisor.add(renewed)
        supervisor.start(names)
        wait_until_passing(mesh, supervisor, batch, before)
    wait_until_ready(mesh, supervisor, wanted, before)
    counts = {"new": added, "renewed": changed, "removed": removed, "started again": stopped}
    return "The mesh is up: " + ", ".join(f"{len(names)} {what}" for what, names in counts.items() if names)


def batches(processes: Iterable[Process]) -> list[list[Process]]:
    """Return what may restart together: one wave, and of each service one replica."""

    def key(process: Process) -> tuple[int, int]:
        number = process.name.rpartition("-")[2]
        return process.wave, int(number) if number.isdecimal() else 0

    return [list(group) for _, group in itertools.groupby(sorted(processes, key=key), key=key)]


def provide_databases(mesh: Layout, supervisor: Supervisor, wanted: list[Process]) -> None:
    """Make each service's database, if PostgreSQL is ours and has it not."""
    server = [process for process in wanted if process.name == "postgresql"]
    if server:
        wait_until_passing(mesh, supervisor, server, programs.restarts(mesh))
        keys = {name: (mesh.secrets / f"postgresql.{name}").read_text().strip() for name in DATABASES}
        with postgresql.connect(mesh.postgresql_port, (mesh.secrets / "postgresql").read_text().strip()) as connection:
            postgresql.provide(connection, keys)


def migrate(environment: Mapping[str, str]) -> None:
    """Bring databases to what the code expects.

    Raises:
        CannotStart: one cannot be; says why.
    """
    # One process for all: most of a migration that has nothing to do is starting Python.
    code = "import sys; from mesh.migrations import main; sys.exit(max(main([name]) for name in sys.argv[1:]))"
    done = subprocess.run(
        [BIN / "python", "-c", code, *DATABASES],
        cwd=ROOT, env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise CannotStart(f"The databases cannot be brought to this version of the code:\n\n{done.stdout.strip()}")


def wait_until_ready(mesh: Layout, supervisor: Supervisor, wanted: list[Process], before: Mapping[str, int]) -> None:
    """Wait until the edge truly answers, and so does what it does not see: the workers."""

    def ready() -> bool:
        return health.ready(mesh) and all(each.passing for each in health.of_all(mesh, wanted).values())

    wait(mesh, supervisor, wanted, before, ready)


def wait_until_passing(mesh: Layout, supervisor: Supervisor, batch: list[Process], before: Mapping[str, int]) -> None:
    """Wait until some programs are well."""
    wait(mesh, supervisor, batch, before, lambda: all(each.passing for each in health.of_all(mesh, batch).values()))


def wait(
    mesh: Layout,
    supervisor: Supervisor,
    processes: list[Process],
    before: Mapping[str, int],
    check: Callable[[], bool],
) -> None:
    """Wait until `check` holds.

    Raises:
        CannotStart: one of `processes` died since `before` was counted, or it takes too long.
    """
    end = time.monotonic() + READY_SECONDS
    looked = 0.0
    with console.status("Waiting …") as shown:
        while not check():
            deaths = programs.restarts(mesh)
            dead = [each.name for each in processes if deaths.get(each.name, 0) > before.get(each.name, 0)]
            if dead:
                for name in dead:
                    display.print_tail(mesh, name)
                raise CannotStart(f"Died while starting: {', '.join(dead)}. Why stands above, at the end of the log.")
            if time.monotonic() - looked > 1:
                looked = time.monotonic()
                supervisor.states()  # raises when supervisord is gone
                answers = health.of_all(mesh, processes)
                late = [f"{name} ({each.answer})" for name, each in answers.items() if not each.passing]
                shown.update(f"Waiting for {', '.join(late[:3])}{' …' if len(late) > 3 else ''}")
            if time.monotonic() > end:
                display.print_table(display.rows(mesh, processes, supervisor))
                raise CannotStart(f"Not ready after {READY_SECONDS} s: {', '.join(late)}. The logs are in {mesh.logs}.")
            time.sleep(0.1)


def tell(mesh: Layout, supervisor: Supervisor, wanted: list[Process], done: str) -> None:
    """Print what runs where and what to type next."""
    display.print_table(display.rows(mesh, wanted, supervisor))
    console.print(f"\n{done} The edge answers at [bold]{mesh.edge_url}[/bold]")
    server = "" if mesh.edge_port == layout.EDGE_PORT else f" --server {mesh.edge_url}"
    command = f".venv/bin/atelier{server}"
    console.print(f"Logs are in {mesh.logs}. Next, make an account and resize a picture:\n", markup=False)
    console.print(
        f"    {command} register\n    {command} run resize photo.jpg --width 800 -o small.webp\n", markup=False
    )


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="scripts/up", add_help=False)  # the script itself answers --help
    described.add_argument("--postgres", action="store_true", help="keep the data in a PostgreSQL of the mesh's own")
    described.add_argument("--replicas", type=_replicas, help="of each service; by default as many as run, or 1")
    return described


def _replicas(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= layout.MAX_REPLICAS:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to {layout.MAX_REPLICAS}")
    return int(text)


if __name__ == "__main__":
    display.run(main, parser())
