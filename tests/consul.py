"""A real Consul for tests, as an installation has it: our ACLs, and a token for each service."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from mesh import discovery, registrar
from mesh.config import ServiceConfig
from scripts.local import configs
from scripts.local.layout import TOOLS, Layout
from tests.eventually import eventually
from tests.ports import free_ports

PROGRAM = shutil.which("consul") or str(TOOLS / "consul")  # where scripts/test puts it


class Consul:
    """One server that can be stopped, wiped and started again."""

    def __init__(self, folder: Path) -> None:
        self.layout = Layout(var=folder)
        configs.make_folders(self.layout)
        http, server, serf = free_ports(3)
        self.url = f"http://127.0.0.1:{http}"
        settings = configs.consul(self.layout, (1, 8), configs.make_secrets(self.layout))
        settings["ports"] |= {"http": http, "server": server, "serf_lan": serf}
        configs.write(self.layout.configs / "consul.json", configs._json(settings))
        self._process: asyncio.subprocess.Process | None = None

    def config(self, service: str, instance: str) -> ServiceConfig:
        """Return the settings of an instance that has its service's token."""

        class Config(ServiceConfig):
            pass

        Config.service = service
        return Config(
            ATELIER_CONSUL_URL=self.url, ATELIER_BROKER_URL="amqp://nobody", ATELIER_CONTROL_ADDRESSES="127.0.0.1:1",
            ATELIER_DATA_DIR=self.layout.data, ATELIER_SECRETS_DIR=self.layout.secrets, ATELIER_INSTANCE=instance,
        )  # fmt: skip

    async def start(self) -> None:
        """Start it and wait until it has our tokens, as the registrar gives them."""
        with (self.layout.logs / "consul.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                PROGRAM, "agent", "-config-file", str(self.layout.configs / "consul.json"), stdout=log, stderr=log
            )
        config = self.config("registrar", "registrar")

        async def reconciled() -> bool:
            async with discovery.connected(config) as client:
                await registrar.reconcile(client, config)
            return True

        await eventually(reconciled, within_seconds=60)

    async def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None

    def wipe(self) -> None:
        shutil.rmtree(self.layout.var / "consul")


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Consul]:
    """Hold a Consul that keeps everything in `folder`."""
    consul = Consul(folder)
    try:
        await consul.start()
        yield consul
    finally:
        await consul.stop()
