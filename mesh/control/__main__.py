"""Runs the control plane: `python -m mesh.control`. Wiring only."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import partial

import grpc
import uvloop
from atelier.mesh.v1 import topology_pb2_grpc
from envoy.service.discovery.v3 import ads_pb2_grpc

from mesh import admin, certificates, channel, contract, discovery, service, telemetry
from mesh.certificates import Leaf
from mesh.control import edge
from mesh.control.config import Config
from mesh.control.plane import Plane
from mesh.control.server import DiscoveryService, Publisher
from mesh.control.topology import ADS_META, TopologyService
from mesh.discovery import Registration
from mesh.identity import RemoteIdentityFeed, Verifier
from mesh.intentions import Intentions
from mesh.live import Live
from mesh.ports import Ports
from mesh.service import Admission

OPENAPI = contract.IMAGE.parent / "openapi.json"


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
    publisher, verifier, rpcs, live = Publisher(), Verifier(), contract.installed(), Live(config)
    live.meta[ADS_META] = config.address

    async with AsyncExitStack() as stack:
        hold = stack.enter_async_context
        leaf = await hold(certificates.kept(config))
        auth = await hold(channel.opened("auth", config, leaf))
        stopping = service.stop_signal(config)
        health, health_address = await hold(service.answering_probes(config))
        live.meta["admin"] = await hold(admin.serving())
        plane = Plane(
            client=await hold(discovery.connected(config)),
            contract=rpcs,
            image=contract.IMAGE.read_bytes(),
            settings=settings(config),
            path=config.data_dir / f"{config.instance}.json",
            leaf=leaf,
            feed=RemoteIdentityFeed(auth),
            publisher=publisher,
            verifier=verifier,
        )
        served, intentions = DiscoveryService(publisher, leaf.caller), Intentions(leaf)
        topology = TopologyService(config.instance, plane, served, rpcs, partial(_peer, config, leaf))
        await hold(service.working([live.follow, plane.run, partial(intentions.follow, config)], config))
        # The same behind two certificates: xDS clients ask for a host's name, all others for the service's.
        shown = config.secret("ads.key").encode(), config.secret("ads.pem").encode()
        ports = Ports(config)
        own = f"{config.host}:{ports.wanted('grpc', config.port)}"
        *_, port = await hold(
            service.listening(
                Admission(verifier, intentions, rpcs, leaf),
                [partial(topology_pb2_grpc.add_TopologyServiceServicer_to_server, topology)],
                {config.address: leaf.grpc_server(shown), own: leaf.grpc_server()},
                config,
                # No contract of ours: it admits its callers itself.
                beside=[partial(ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server, served)],
            )
        )
        ports.keep("grpc", port)
        registration = Registration(config.service, config.instance, config.host, port, health_address, live.meta)
        await service.present(config, [registration], [plane.check], health, stopping)
        await asyncio.sleep(service.PROPAGATION_SECONDS)
        served.end_streams()


def _peer(config: Config, leaf: Leaf, address: str) -> grpc.aio.Channel:
    """Return a channel to another control plane."""
    trusted, own = config.secret("ads-ca.pem").encode(), leaf.present
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(trusted, own.key, own.certificate))


if __name__ == "__main__":
    uvloop.run(main(Config()))
