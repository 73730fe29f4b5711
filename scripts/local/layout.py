"""What runs on one machine, where it listens and what it is told: the only list of processes.

Services are found in their folders: nothing here changes for a new one (docs/new-service.md). The ports are ours (a
base plus offsets) and the state lies in one folder, so that two meshes can run side by side.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = ROOT / ".venv" / "bin"
TOOLS = ROOT / "var" / "tools"  # programs, not state: shared by every mesh of this checkout
WEIGHTS = TOOLS / "weights"  # of the models that scripts/up installs, with their manifest

PORT_BASE = 17000
EDGE_PORT = 8080
SPAN = 700  # ports from the base on that belong to one mesh
MAX_REPLICAS = 50
SQLITE, POSTGRESQL = "sqlite", "postgresql"  # what keeps the services' data


def _with(file: str) -> tuple[str, ...]:
    """Return the services whose folder has `file`, by name."""
    folder = ROOT / "services"
    return tuple(sorted(path.relative_to(folder).parts[0] for path in folder.glob(f"*/{file}")))


SERVICES = _with("__main__.py")
DATABASES = _with("tables.py")
ELSEWHERE = "ATELIER_DATABASES_ELSEWHERE"  # among the settings of the last start
WORKERS = {f"{name}-worker": name for name in _with("worker/__main__.py")}  # and whose they are
AUTHORITIES = (*SERVICES, *WORKERS, "control", "edge", "operator", "registrar")  # who has a token of Consul
PREFIXES = (*(f"{name.upper()}_" for name in SERVICES), "CONTROL_", "ATELIER_", "OTEL_")

# Whoever has this variable with our state folder in it was started by our supervisor, or by its child.
MARKER = "ATELIER_SUPERVISED"


class SettingRefused(Exception):
    """A setting of the caller's cannot be used; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Process:
    """One supervised program.

    `wave` orders starting (and, backwards, stopping): what has the same one starts together.
    `sources` are the files and folders, relative to the root, whose change asks for a restart.
    """

    name: str
    wave: int
    command: tuple[str, ...]
    environment: Mapping[str, str]
    sources: tuple[str, ...] = ()
    address: str = ""
    stop_seconds: int = 25  # a service drains its HTTP listener, then its gRPC server, 10 s each at most
    stop_signal: str = "TERM"
    stops_children: bool = True
    user: str | None = None  # as whom it runs, if not as ourselves
    folder: Path | None = None  # where it runs, if not in the root


@dataclass(frozen=True)
class Layout:
    """One mesh: where its state is, which ports it has, how many of each service."""

    var: Path
    port_base: int = PORT_BASE
    edge_port: int = EDGE_PORT
    replicas: int = 1
    database: str = SQLITE
    elsewhere: tuple[str, ...] = ()
    """Services whose databases the caller names."""

    @classmethod
    def from_environment(cls, caller: Mapping[str, str]) -> Layout:
        """Return the mesh that the caller's environment means; where it is silent, the mesh is as it was last.

        Raises:
            SettingRefused: a port or the folder cannot be used, or the data is in another kind of database.
        """
        var = Path(caller.get("ATELIER_VAR") or ROOT / "var").absolute()
        file = cls(var).last
        last = json.loads(file.read_text()) if file.exists() else {}
        environment = {**last, **caller}
        base = _number(environment, "ATELIER_PORT_BASE", PORT_BASE, 65535)
        edge = _number(environment, "ATELIER_EDGE_PORT", EDGE_PORT, 65535)
        replicas = _number(environment, "ATELIER_REPLICAS", 1, MAX_REPLICAS)
        if base + SPAN > 65536:
            raise SettingRefused(f"ATELIER_PORT_BASE={base} is too high: the mesh takes {SPAN} ports from there on.")
        if base <= edge < base + SPAN:
            raise SettingRefused(
                f"ATELIER_EDGE_PORT={edge} lies among the mesh's own ports {base} to {base + SPAN - 1}; take another."
            )
        database = environment.get("ATELIER_DATABASE") or SQLITE
        if database not in (SQLITE, POSTGRESQL):
            raise SettingRefused(f"ATELIER_DATABASE={database} is neither {SQLITE} nor {POSTGRESQL}.")
        if last and database != last.get("ATELIER_DATABASE", SQLITE):
            raise SettingRefused(
                f"ATELIER_DATABASE={database} (--postgres) comes too late: the data of this mesh is kept by "
                f"{last.get('ATELIER_DATABASE', SQLITE)}, in {var}. Begin another by ATELIER_VAR, or anew after "
                "scripts/down --erase."
            )
        elsewhere = tuple(name for name in DATABASES if f"{name.upper()}_DATABASE_URL" in caller)
        layout = cls(var=var, port_base=base, edge_port=edge, replicas=replicas, database=database, elsewhere=elsewhere)
        if len(str(layout.socket)) > 100:  # the kernel's limit on a socket's path is 107
            raise SettingRefused(f"The path of ATELIER_VAR={var} is too long for a Unix socket; take a shorter one.")
        if not set('"%\n').isdisjoint(str(var)):
            raise SettingRefused(f"ATELIER_VAR={var} may not hold a double quote, a percent sign or a line break.")
        return layout

    @property
    def last(self) -> Path:
        """Where the settings lie with which this mesh was last started."""
        return self.var / "run" / "settings.json"

    @property
    def settings(self) -> dict[str, str]:
        """What `from_environment` would need to be told to return this."""
        return {
            "ATELIER_PORT_BASE": str(self.port_base),
            "ATELIER_EDGE_PORT": str(self.edge_port),
            "ATELIER_REPLICAS": str(self.replicas),
            "ATELIER_DATABASE": self.database,
            ELSEWHERE: " ".join(self.elsewhere),
        }

    @property
    def data(self) -> Path:
        return self.var / "data"

    @property
    def secrets(self) -> Path:
        return self.var / "secrets"

    @property
    def configs(self) -> Path:
        return self.var / "configs"

    @property
    def edge_identity(self) -> Path:
        """Where the edge's certificate lies."""
        return self.data / "identity" / "edge-1"

    @property
    def edge_secrets(self) -> Path:
        """What tells Envoy of it, a file each for the certificate and the roots."""
        return self.configs / "edge"

    @property
    def logs(self) -> Path:
        return self.var / "log"

    @property
    def socket(self) -> Path:
        return self.var / "run" / "supervisor.sock"

    @property
    def state_folders(self) -> tuple[Path, ...]:
        """What belongs to this mesh alone; `down --erase` deletes these and nothing else."""
        names = ("data", "secrets", "configs", "log", "run", "consul", "rabbitmq", "postgresql")
        return tuple(self.var / name for name in names)

    @property
    def edge_url(self) -> str:
        return f"http://127.0.0.1:{self.edge_port}"

    @property
    def consul_url(self) -> str:
        return f"http://127.0.0.1:{self.consul_port}"

    @property
    def control_ports(self) -> list[int]:
        return [self.port_base + 100 + number for number in range(self.replicas)]

    @property
    def envoy_admin_port(self) -> int:
        return self.port_base + 190

    @property
    def edge_base_id(self) -> int:
        """By what Envoy's shared memory is told from that of other meshes and other users."""
        return zlib.crc32(f"{os.geteuid()} {self.var}".encode()) % 100_000_000

    @property
    def edge_socket(self) -> Path:
        """Where one Envoy hands over to the next; Envoy appends which one it is."""
        return self.var / "run" / "envoy"

    @property
    def consul_rpc_port(self) -> int:
        return self.port_base + 300

    @property
    def consul_serf_port(self) -> int:
        return self.port_base + 301

    @property
    def epmd_port(self) -> int:
        return self.port_base + 369

    @property
    def consul_port(self) -> int:
        return self.port_base + 500

    @property
    def postgresql(self) -> Path:
        """The server's files, where it is ours."""
        return self.var / "postgresql" / "data"

    @property
    def postgresql_port(self) -> int:
        return self.port_base + 632

    @property
    def broker_port(self) -> int:
        return self.port_base + 672

    @property
    def broker_peer_port(self) -> int:
        return self.port_base + 673

    @property
    def fixed_ports(self) -> dict[int, str]:
        """The ports that must be free before a start, and who is to have them."""
        return {
            self.edge_port: "the edge",
            self.envoy_admin_port: "Envoy's admin",
            **dict.fromkeys(self.control_ports, "the control plane"),
            self.consul_port: "Consul",
            self.consul_rpc_port: "Consul's server",
            self.consul_serf_port: "Consul's membership",
            self.epmd_port: "Erlang's port mapper",
            self.broker_port: "RabbitMQ",
            self.broker_peer_port: "RabbitMQ's peers",
            **({self.postgresql_port: "PostgreSQL"} if self.database == POSTGRESQL else {}),
        }

    @cached_property
    def marker(self) -> dict[str, str]:
        return {MARKER: str(self.var)}


def _number(environment: Mapping[str, str], name: str, default: int, largest: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or not 1 <= int(text) <= largest:
        raise SettingRefused(f"{name}={text} is not a number from 1 to {largest}.")
    return int(text)


def mesh_environment(layout: Layout, caller: Mapping[str, str], broker_secret: str) -> dict[str, str]:
    """Return what every Python process is told.

    A caller's own `TASK_…` and the like win over our defaults; where the parts of the mesh are is ours to say.
    """
    databases = {f"{name.upper()}_DATABASE_URL": f"sqlite+aiosqlite:///{layout.data}/{name}.db" for name in DATABASES}
    return {
        **databases,
        "STORAGE_BLOBS_DIR": str(layout.data / "blobs"),
        "MEDIA_WORKER_WEIGHTS_DIR": str(WEIGHTS),
        **{name: value for name, value in sorted(caller.items()) if name.startswith(PREFIXES)},
        **layout.settings,
        "ATELIER_VAR": str(layout.var),
        "ATELIER_CONSUL_URL": layout.consul_url,
        "ATELIER_BROKER_URL": f"amqp://atelier:{broker_secret}@127.0.0.1:{layout.broker_port}/",
        "ATELIER_CONTROL_ADDRESSES": ",".join(f"127.0.0.1:{port}" for port in layout.control_ports),
        "ATELIER_DATA_DIR": str(layout.data),
        "ATELIER_SECRETS_DIR": str(layout.secrets),
        "ATELIER_EDGE_SECRETS": str(layout.edge_secrets),
        **layout.marker,
    }


def processes(
    layout: Layout, environment: Mapping[str, str], *, consul: str, rabbitmq: str, postgresql: tuple[str, ...] = ()
) -> list[Process]:
    """Return every program of the mesh, in the order in which they are started.

    Args:
        layout: the mesh.
        environment: what `mesh_environment` returned.
        consul: path of the Consul program.
        rabbitmq: path of RabbitMQ's own `rabbitmq-server`, not of the wrapper that changes the user.
        postgresql: what runs the server, where it is ours.
    """
    python = str(BIN / "python")
    libraries = ("requirements/runtime.txt", "requirements/overlay.txt")
    contracts = ("mesh", "generated", *libraries)
    # The rest of the caller's environment does not reach the brokers: they are configured by our files alone.
    bare = dict(layout.marker)
    # Nobody but the service itself is told the password of its database.
    shared = {name: value for name, value in environment.items() if not name.endswith("_DATABASE_URL")}
    numbers = range(1, layout.replicas + 1)

    def replicas(
        name: str, module: str, sources: tuple[str, ...], wave: int, *, owns_children: bool = False
    ) -> list[Process]:
        return [
            Process(
                name=f"{name}-{number}",
                wave=wave,
                command=(python, "-m", module),
                environment={
                    **shared,
                    **{own: environment[own] for own in (f"{name.upper()}_DATABASE_URL",) if own in environment},
                    "ATELIER_INSTANCE": f"{name}-{number}",
                },
                sources=(*contracts, *sources),
                stops_children=not owns_children,
            )
            for number in numbers
        ]

    controls = [
        Process(
            name=f"control-{number}",
            wave=1,
            command=(python, "-m", "mesh.control"),
            environment={
                **shared,
                "ATELIER_INSTANCE": f"control-{number}",
                "CONTROL_ADDRESS": f"127.0.0.1:{port}",
            },
            sources=contracts,
            address=f"127.0.0.1:{port}",
        )
        for number, port in zip(numbers, layout.control_ports, strict=True)
    ]
    databases = [
        Process(
            name="postgresql",
            wave=0,
            command=postgresql,
            environment=bare,
            address=f"127.0.0.1:{layout.postgresql_port}",
            stop_seconds=30,  # it writes out what it has in memory, or has to recover it
            stop_signal="INT",  # TERM would wait for everybody to go by himself
            stops_children=False,
            user=postgresql_account(),
        )
    ]
    return [
        Process(
            name="epmd",
            wave=0,
            command=("epmd", "-address", "127.0.0.1", "-port", str(layout.epmd_port)),
            environment=bare,
            address=f"127.0.0.1:{layout.epmd_port}",
        ),
        Process(
            name="consul",
            wave=0,
            command=(consul, "agent", "-config-file", str(layout.configs / "consul.json")),
            environment=bare,
            sources=(str(layout.configs / "consul.json"),),
            address=f"127.0.0.1:{layout.consul_port}",
        ),
        Process(
            name="rabbitmq",
            wave=0,
            command=(rabbitmq,),
            environment={**bare, **_rabbitmq_environment(layout)},
            sources=(str(layout.configs / "rabbitmq.conf"),),
            address=f"127.0.0.1:{layout.broker_port}",
            stop_seconds=30,  # it closes its queues; a broker killed in that has to recover them
            folder=layout.var / "rabbitmq",  # a broken start leaves a dump behind
        ),
        *(databases if layout.database == POSTGRESQL else ()),
        Process(
            name="registrar",
            wave=1,
            command=(python, "-m", "mesh.registrar"),
            environment={**shared, "ATELIER_INSTANCE": "registrar"},
            sources=contracts,
        ),
        Process(
            name="edge-certificates",
            wave=1,
            command=(python, "-m", "mesh.edge_certificates"),
            environment={**shared, "ATELIER_INSTANCE": layout.edge_identity.name},
            sources=contracts,
        ),
        *controls,
        *(
            process
            for name in SERVICES
            for process in replicas(name, f"services.{name}", (f"services/{name}",), 2)
        ),
        *(
            process
            for name, owner in WORKERS.items()
            # It asks its own children to stop, and finishes what it has begun.
            for process in replicas(name, f"services.{owner}.worker", (f"services/{owner}",), 2, owns_children=True)
        ),
        Process(
            name="envoy",
            wave=3,
            command=(
                python, "-m", "scripts.local.edge", str(layout.envoy_admin_port),
                str(BIN / "envoy"), "--config-path", str(layout.configs / "envoy.json"),
                "--concurrency", "2", "--log-level", "warning",
                "--base-id", str(layout.edge_base_id),
                "--socket-path", str(layout.edge_socket), "--socket-mode", "600",
                # One that is replaced closes each connection at its next answer, and what is idle or lasts at the end.
                "--drain-strategy", "immediate", "--drain-time-s", "10", "--parent-shutdown-time-s", "15",
            ),
            environment=bare,
            sources=(str(layout.configs / "envoy.json"), "scripts/local/edge.py", *libraries),
            address=f"127.0.0.1:{layout.edge_port}",
            stops_children=False,  # it asks Envoy to end when that has finished
        ),
    ]  # fmt: skip


def postgresql_account() -> str | None:
    """Return as whom PostgreSQL runs, which refuses to be root: as the user whom its package makes, or as ourselves."""
    return "postgres" if os.geteuid() == 0 else None


def _rabbitmq_environment(layout: Layout) -> dict[str, str]:
    home = layout.var / "rabbitmq"
    return {
        "HOME": str(home),  # .erlang.cookie is read from there
        "RABBITMQ_NODENAME": "atelier@localhost",
        "RABBITMQ_MNESIA_BASE": str(home / "mnesia"),
        "RABBITMQ_LOG_BASE": str(layout.logs),
        "RABBITMQ_CONFIG_FILE": str(layout.configs / "rabbitmq.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(layout.configs / "rabbitmq.plugins"),
        "RABBITMQ_CONF_ENV_FILE": os.devnull,
        "RABBITMQ_PID_FILE": str(home / "pid"),
        "RABBITMQ_DIST_PORT": str(layout.broker_peer_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(layout.epmd_port),
        # epmd is a program of its own here: one that Erlang starts would outlive the mesh. Idle schedulers sleep.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1} "
        "+sbwt none +sbwtdcpu none +sbwtdio none",
        "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the node, which then gets our signals itself
    }
