"""What the programs are told by file: secrets made once, and the settings of Consul, RabbitMQ, Envoy, supervisord."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import secrets
import shlex
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mesh.certificates import CERTIFICATE, KEY, PRESENT, ROOTS
from scripts.local import authority
from scripts.local.layout import AUTHORITIES, DATABASES, ROOT, Layout, Process, SettingRefused

SECRETS = ("admin", "broker", "capability.key", "erlang.cookie", "postgresql", "url.key")
LOG_BYTES = 10_000_000  # a program's log is turned over at this size, two old ones are kept
_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
ENOUGH_FILES = 65_536  # open files a process may have; less where the machine's hard limit is less


def make_folders(layout: Layout) -> None:
    """Make the state folders, readable by nobody else."""
    layout.var.mkdir(parents=True, exist_ok=True)
    for folder in (*layout.state_folders, layout.edge_secrets, layout.data / "blobs"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def make_secrets(layout: Layout) -> dict[str, str]:
    """Return the installation's secrets by name; those that do not exist yet are drawn."""
    drawn: dict[str, Callable[[], str]] = {
        **dict.fromkeys(SECRETS, lambda: secrets.token_hex(32)),
        **dict.fromkeys((f"postgresql.{name}" for name in DATABASES), lambda: secrets.token_hex(32)),
        **{f"consul.{name}": lambda: str(uuid.uuid4()) for name in AUTHORITIES},
        "connect.id": lambda: str(uuid.uuid4()),
    }
    for name, draw in drawn.items():
        if not (layout.secrets / name).exists():
            write(layout.secrets / name, draw())
    found = {name: (layout.secrets / name).read_text().strip() for name in drawn}
    if not (layout.secrets / "connect.pem").exists():
        write_root(layout, authority.connect(found["connect.id"]))
    if not (layout.secrets / "ads.pem").exists():
        bootstrap = authority.Authority("Atelier bootstrap")
        certificate, key = bootstrap.issue("control", authority.names("control", "localhost", "127.0.0.1"))
        write(layout.secrets / "ads-ca.key", bootstrap.key_pem)
        write(layout.secrets / "ads-ca.pem", bootstrap.certificate_pem)
        write(layout.secrets / "ads.key", key)
        write(layout.secrets / "ads.pem", certificate)  # last: it stands for all four
    return {**found, **{name: (layout.secrets / name).read_text() for name in ("connect.key", "connect.pem")}}


def write_root(layout: Layout, root: authority.Authority) -> None:
    """Have `root` sign the certificates of services; a running mesh moves over to it by itself."""
    write(layout.secrets / "connect.key", root.key_pem)
    write(layout.secrets / "connect.pem", root.certificate_pem)  # last: it is what the registrar compares


def write(path: Path, text: str) -> None:
    """Put `text` at `path` in one step, for this user's eyes only."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    fresh.replace(path)


def write_all(layout: Layout, keys: Mapping[str, str], *, consul_version: tuple[int, int]) -> None:
    """Write what Consul, RabbitMQ and Envoy read at their start."""
    write(layout.configs / "consul.json", _json(consul(layout, consul_version, keys)))
    write(layout.configs / "rabbitmq.conf", rabbitmq(layout, keys["broker"]))
    write(layout.configs / "rabbitmq.plugins", "[].\n")
    write(layout.configs / "envoy.json", _json(envoy(layout)))
    for name, secret in edge_secrets(layout.edge_identity).items():
        write(layout.edge_secrets / f"{name}.json", _json({"resources": [secret]}))
    cookie = layout.var / "rabbitmq" / ".erlang.cookie"
    if not cookie.exists():
        write(cookie, keys["erlang.cookie"])
        cookie.chmod(0o400)


def remember(layout: Layout) -> None:
    """Keep how this mesh is started, for scripts that are told nothing else."""
    write(layout.last, _json(layout.settings))


def _json(settings: object) -> str:
    return json.dumps(settings, indent=2) + "\n"


def consul(layout: Layout, version: tuple[int, int], keys: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of a single Consul server on loopback.

    Root, trust domain and management token are ours, so that a wiped Consul comes back as the same authority.
    """
    management = "initial_management" if version >= (1, 11) else "master"
    ports = {
        "http": layout.consul_port,
        "server": layout.consul_rpc_port,
        "serf_lan": layout.consul_serf_port,
        "serf_wan": -1,
        "dns": -1,
        "https": -1,
        "grpc": -1,
    }
    if version >= (1, 14):  # from there on it has a second port, which older ones do not know
        ports["grpc_tls"] = -1
    return {
        "server": True,
        "bootstrap_expect": 1,
        "node_name": "atelier",
        "bind_addr": "127.0.0.1",
        "client_addr": "127.0.0.1",
        "data_dir": str(layout.var / "consul"),
        "ports": ports,
        "acl": {
            "enabled": True,
            "default_policy": "deny",
            "tokens": {management: keys["consul.registrar"], "agent": keys["consul.registrar"]},
        },
        "connect": {
            "enabled": True,
            "ca_provider": "consul",
            "ca_config": {
                "cluster_id": keys["connect.id"],
                "root_cert": keys["connect.pem"],
                "private_key": keys["connect.key"],
            },
        },
        "disable_update_check": True,
        "leave_on_terminate": False,  # a stop is no farewell: it comes back with its data
        "log_level": "WARN",
        "performance": {"raft_multiplier": 1},  # a leader in a second; the default is for slow clusters
        # Every process of the mesh holds several blocking queries, and all come from one address.
        "limits": {"http_max_conns_per_client": 2000},
    }


def rabbitmq(layout: Layout, password: str) -> str:
    """Return rabbitmq.conf: one listener on loopback, one user of our own, small write-ahead log."""
    return f"""\
listeners.tcp.1 = 127.0.0.1:{layout.broker_port}
default_user = atelier
default_pass = {password}
log.console = true
log.console.level = info
log.connection.level = warning
log.file = false
# Quorum queues hold this much in memory until it is turned over; the default of 512 MiB is for servers.
raft.wal_max_size_bytes = 64000000
"""


def envoy(layout: Layout) -> dict[str, Any]:
    """Return Envoy's bootstrap: who it is, and that all else comes from the control plane by ADS."""
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    control = [{"endpoint": {"address": _address(port)}} for port in layout.control_ports]
    return {
        "node": {"id": "edge-1", "cluster": "edge", "locality": {"zone": os.environ.get("ATELIER_ZONE", "")}},
        "admin": {"address": _address(layout.envoy_admin_port)},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "GRPC",
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "ads"}}],
            },
            # Waits for the control plane as long as it takes: an Envoy that gave up and served nothing would still
            # take over from the one before.
            "lds_config": {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"},
            "cds_config": {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"},
        },
        "static_resources": {
            "clusters": [
                {
                    "name": "ads",
                    "connect_timeout": "1s",
                    "typed_extension_protocol_options": {
                        options: {
                            "@type": f"type.googleapis.com/{options}",
                            "explicit_http_config": {
                                # A control plane that hangs is left for the other one.
                                "http2_protocol_options": {"connection_keepalive": {"interval": "10s", "timeout": "5s"}}
                            },
                        }
                    },
                    "transport_socket": {
                        "name": "tls",
                        "typed_config": {
                            "@type": f"{_TLS}.UpstreamTlsContext",
                            "common_tls_context": {
                                "alpn_protocols": ["h2"],
                                "tls_certificate_sds_secret_configs": [
                                    {
                                        "name": "leaf",
                                        "sds_config": {
                                            "path_config_source": {"path": str(layout.edge_secrets / "leaf.json")},
                                            "resource_api_version": "V3",
                                        },
                                    }
                                ],
                                "validation_context": {
                                    "trusted_ca": {"filename": str(layout.secrets / "ads-ca.pem")},
                                    "match_typed_subject_alt_names": [
                                        {"san_type": "DNS", "matcher": {"exact": "control"}}
                                    ],
                                },
                            },
                        },
                    },
                    "load_assignment": {"cluster_name": "ads", "endpoints": [{"lb_endpoints": control}]},
                }
            ]
        },
    }


def edge_secrets(identity: Path) -> dict[str, Any]:
    """Return, by name, what tells Envoy where the edge's certificate and the mesh's roots lie; it follows them."""
    newest, watched = identity / PRESENT, {"path": str(identity)}
    leaf = {
        "certificate_chain": {"filename": str(newest / CERTIFICATE)},
        "private_key": {"filename": str(newest / KEY)},
        "watched_directory": watched,
    }
    roots = {"trusted_ca": {"filename": str(newest / ROOTS)}, "watched_directory": watched}
    return {
        "leaf": {"@type": f"{_TLS}.Secret", "name": "leaf", "tls_certificate": leaf},
        "roots": {"@type": f"{_TLS}.Secret", "name": "roots", "validation_context": roots},
    }


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def supervisord(layout: Layout, processes: Iterable[Process], fingerprints: Mapping[str, str]) -> str:
    """Return supervisord's configuration.

    A program's fingerprint stands in its environment, so that a changed source is, to supervisord, a changed program.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(ENOUGH_FILES, hard)
    run = layout.socket.parent
    sections = [
        f"""\
[unix_http_server]
file={layout.socket}
chmod=0700

[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface

[supervisord]
directory={_percent(ROOT)}
logfile={layout.logs}/supervisord.log
pidfile={run}/supervisord.pid
childlogdir={layout.logs}
minfds={files}
{"user=root" if os.geteuid() == 0 else ""}
"""
    ]
    sections += [_program(layout, process, fingerprints.get(process.name, "")) for process in processes]
    return "\n".join(sections)


def _program(layout: Layout, process: Process, fingerprint: str) -> str:
    environment = {**process.environment, "ATELIER_SOURCE": fingerprint}
    settings = ",".join(f"{name}={_quoted(name, value)}" for name, value in environment.items())
    # A process outlives its supervisor by no more than its own orderly stop, even when that is killed with -9.
    bound = ("setpriv", "--pdeathsig", process.stop_signal, "--") if shutil.which("setpriv") else ()
    return f"""\
[program:{process.name}]
{f"user={process.user}" if process.user else ""}
{f"directory={_percent(process.folder)}" if process.folder else ""}
command={_percent(shlex.join((*bound, *process.command)))}
environment={settings}
autostart=false
autorestart=true
; alive for startsecs counts as started; one that ends sooner is tried again after 1 s, 2 s, 3 s …
startsecs=3
startretries=100
stopsignal={process.stop_signal}
stopwaitsecs={process.stop_seconds}
stopasgroup={str(process.stops_children).lower()}
killasgroup=true
redirect_stderr=true
stdout_logfile={layout.logs}/{process.name}.log
stdout_logfile_maxbytes={LOG_BYTES}
stdout_logfile_backups=2
"""


def _percent(value: object) -> str:
    return str(value).replace("%", "%%")


def _quoted(name: str, value: str) -> str:
    """Quote a value for supervisord, which knows no escapes within quotes."""
    quote = "'" if '"' in value else '"'
    if quote in value or "\n" in value:
        raise SettingRefused(f"{name} holds both kinds of quotes or a line break, which supervisord cannot pass on.")
    return f"{quote}{_percent(value)}{quote}"


def fingerprint(sources: Iterable[str]) -> str:
    """Return a short hash over the content of files and folders, paths relative to the root."""
    digest = hashlib.sha256()
    for source in sources:
        start = ROOT / source
        paths = sorted(start.rglob("*")) if start.is_dir() else [start]
        for path in paths:
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md":
                digest.update(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
