"""Runs the control plane: `python -m mesh.control`. Wiring only."""

from __future__ import annotations

import asyncio
import signal
from functools import partial

import grpc
from atelier.mesh.v1 import topology_pb2_grpc
from envoy.service.discovery.v3 import ads_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from mesh import admin, certificates, channel, contract, discovery, telemetry
from mesh.certificates import Leaf
from mesh.control import edge
from mesh.control.config import Config
from mesh.control.plane import Plane
from mesh.control.server import DiscoveryService, Publisher
from mesh.control.topology import ADS_META, TopologyService
from mesh.discovery import Registration
from mesh.identity import IdentityFeed, RemoteIdentityFeed, Verifier
from mesh.live import Live
from mesh.service import Admission, Register

OPENAPI = contract.IMAGE.parent / "openapi.json"
OPTIONS = [
    ("grpc.so_reuseport", 0),  # a second control plane on this port would be a mistake
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # Envoy asks every 10 s whether this one is alive
    ("grpc.keepalive_permit_without_calls", 1),
]


def settings(config: Config) -> edge.Settings:
    return edge.Settings(
        host=config.edge_host,
        port=config.edge_port,
        cors_origins=config.cors_origins,
        rates={
            "READ": config.rate_read,
            "WRITE": config.rate_write,
            "SIGN_IN": config.rate_sign_in,
            "BYTES": config.rate_bytes,
        },
        max_requests=config.max_requests,
        secrets=config.edge_secrets,
        openapi=OPENAPI.read_text() if OPENAPI.exists() else None,
    )


async def main(config: Config) -> None:
    telemetry.configure(config.service, config.instance)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)

    async with certificates.kept(config) as leaf, channel.opened("auth", config, leaf) as auth:
        await serve(config, leaf, RemoteIdentityFeed(auth), stopping)


async def serve(config: Config, leaf: Leaf, feed: IdentityFeed, stopping: asyncio.Event) -> None:
    publisher, verifier, rpcs, live = Publisher(), Verifier(), contract.installed(), Live(config)
    served = DiscoveryService(publisher, leaf.caller)
    live.meta[ADS_META] = config.address

    def peer(address: str) -> grpc.aio.Channel:
        trusted, own = config.secret("ads-ca.pem").encode(), leaf.present
        credentials = grpc.ssl_channel_credentials(trusted, own.key, own.certificate)
        return grpc.aio.secure_channel(address, credentials)

    health, health_server = HealthServicer(), grpc.aio.server()
    await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, health_server)
    health_address = f"{config.host}:{health_server.add_insecure_port(f'{config.host}:{config.health_port}')}"
    await health_server.start()

    async with (
        discovery.connected(config) as client,
        admin.serving() as live.meta["admin"],
        asyncio.TaskGroup() as tasks,
    ):
        plane = Plane(
            client=client,
            contract=rpcs,
            image=contract.IMAGE.read_bytes(),
            settings=settings(config),
            path=config.data_dir / f"{config.instance}.json",
            leaf=leaf,
            feed=feed,
            publisher=publisher,
            verifier=verifier,
        )
        admitting = Admission(verifier, rpcs, leaf)
        server = grpc.aio.server(handlers=[admitting], options=OPTIONS)
        # No contract of ours: it admits its callers itself.
        ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(served, server)
        topology = TopologyService(config.instance, plane, served, rpcs, peer)
        register: Register = partial(topology_pb2_grpc.add_TopologyServiceServicer_to_server, topology)
        register(admitting)
        # The same behind two certificates: xDS clients ask for a host's name, all others for the service's.
        shown = config.secret("ads.key").encode(), config.secret("ads.pem").encode()
        server.add_secure_port(config.address, leaf.grpc_server(shown))
        port = server.add_secure_port(f"{config.host}:{config.port}", leaf.grpc_server())
        await server.start()
        running = [
            tasks.create_task(plane.run(partial(health.set, "", health_pb2.HealthCheckResponse.SERVING))),
            tasks.create_task(live.follow()),
        ]
        registration = Registration(config.service, config.instance, config.host, port, health_address, live.meta)
        async with discovery.registered(config, [registration]):
            await stopping.wait()
        # Streams never end by themselves: clients keep what they have and go to another control plane, or wait.
        await server.stop(None)
        for task in running:
            task.cancel()
    await health_server.stop(None)


if __name__ == "__main__":
    asyncio.run(main(Config()))
