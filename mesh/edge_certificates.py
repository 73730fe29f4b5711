"""Keeps the edge's certificate where Envoy reads it: `python -m mesh.edge_certificates`. Wiring only."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from mesh import certificates, telemetry
from mesh.config import ServiceConfig


class Config(ServiceConfig):
    """`EDGE_…`."""

    service: ClassVar[str] = "edge"


async def main(config: Config) -> None:
    telemetry.configure(config.service, config.instance)
    async with certificates.kept(config):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Config()))
