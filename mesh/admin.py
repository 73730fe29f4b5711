"""What gRPC tells of itself, for grpcdebug and the like: channelz, and what its xDS client was told (CSDS)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import grpc
from grpc_channelz.v1 import channelz
from grpc_csds import add_csds_servicer


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    """Answer on a free port of loopback, whatever the service's own address; yields `host:port`."""
    with ThreadPoolExecutor(1) as pool:  # CSDS exists for threads only
        server = grpc.aio.server(migration_thread_pool=pool)
        channelz.add_channelz_servicer(server)
        add_csds_servicer(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        yield f"127.0.0.1:{port}"
        await server.stop(None)
