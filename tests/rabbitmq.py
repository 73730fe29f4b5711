"""A real RabbitMQ node for tests: its own folder, ports and cookie, so that several may run on one machine."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scripts.local.install import rabbitmq_servers
from tests.ports import free_ports

START_SECONDS = 60.0  # about 5 on an idle machine


class Node:
    """One broker that can be killed and started again with what it had on disk."""

    def __init__(self, folder: Path, patience_seconds: float) -> None:
        self._folder = folder
        self._port, distribution_port, self._epmd_port = free_ports(3)
        self.url = f"amqp://guest:guest@127.0.0.1:{self._port}/"
        self._process: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None

        cookie = folder / ".erlang.cookie"
        cookie.write_text("a test's node")
        cookie.chmod(0o400)
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self._port}\n"
            "log.console = false\n"
            # A test machine's disk is often nearly full, and an alarm would block every publisher.
            "disk_free_limit.absolute = 1MB\n"
            f"consumer_timeout = {patience_seconds * 1000:.0f}\n"
        )
        (folder / "enabled_plugins").write_text("[].\n")
        self._environment = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(folder),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": "test@localhost",
            "RABBITMQ_DIST_PORT": str(distribution_port),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-start_epmd false "
            "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none "
            # How often it looks whether its patience is at an end, at most; usually a minute.
            f"-rabbit channel_tick_interval {min(60, patience_seconds / 4) * 1000:.0f}",
            "RUNNING_UNDER_SYSTEMD": "true",  # the script becomes the node: one process to kill
        }

    def start(self) -> None:
        """Start the node and wait until it takes connections."""
        if self._epmd is None:
            # Ours, or Erlang would start one that outlives the test.
            epmd = ["epmd", "-address", "127.0.0.1", "-port", str(self._epmd_port)]
            self._epmd = subprocess.Popen(epmd, env=self._environment)
        with (self._folder / "output").open("ab") as output:
            self._process = subprocess.Popen(
                [rabbitmq_servers()[-1]],
                env=self._environment,
                cwd=self._folder,
                stdout=output,
                stderr=output,
            )
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1) as connection:
                connection.settimeout(5)
                connection.sendall(b"AMQP\x00\x00\x09\x01")
                if connection.recv(1):  # Connection.Start: it speaks, so it has finished booting
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"RabbitMQ did not start: {(self._folder / 'output').read_text()[-2000:]}")
            time.sleep(0.1)

    def kill(self) -> None:
        """End the node without a word to anybody, as kill -9 does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.kill()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()


@contextmanager
def running(folder: Path, *, patience_seconds: float = 1800) -> Iterator[Node]:
    """Hold a node that keeps everything in `folder` and takes back what is not acknowledged within its patience."""
    node = Node(folder, patience_seconds)
    try:
        node.start()
        yield node
    finally:
        node.close()
