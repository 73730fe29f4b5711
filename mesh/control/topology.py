"""atelier.mesh.v1.TopologyService: what the registry, the policies and the xDS streams say, for people to look at."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

import grpc
from atelier.mesh.v1 import topology_pb2 as pb
from atelier.mesh.v1 import topology_pb2_grpc
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.contract import Contract
from mesh.control.catalog import Seen
from mesh.control.faults import Faults
from mesh.control.plane import Plane
from mesh.control.server import DiscoveryService, Stream, Subscription
from mesh.control.snapshot import Snapshot
from mesh.discovery import PASSING
from mesh.intentions import Intention, denied

ADS_META = "ads"
"""What a control plane's registration calls the address at which it shows a host's certificate."""
PEER_SECONDS = 1.0  # a control plane that hangs must not hide what the others know

Peer = Callable[[str], grpc.aio.Channel]
"""Opens a channel to the control plane at an address."""

log = logging.getLogger(__name__)


class TopologyService(topology_pb2_grpc.TopologyServiceServicer):
    """Shows what `plane` knows and whom `discovery` serves; asks the other control planes for their clients."""

    def __init__(
        self, instance: str, plane: Plane, discovery: DiscoveryService, contract: Contract, peer: Peer
    ) -> None:
        self._peer = peer
        self._instance = instance
        self._plane = plane
        self._discovery = discovery
        self._contract = contract

    async def GetTopology(  # noqa: N802 - the rpc's name
        self, request: pb.GetTopologyRequest, _context: object
    ) -> pb.GetTopologyResponse:
        seen, wanted = self._plane.follower.seen, names_of(request.service)
        controls = {name: each for name, each in seen.get("control", {}).items() if each.status == PASSING}
        peers = sorted(name for name in controls if name != self._instance)
        answers = await asyncio.gather(*(_clients_of(controls[name], request.service, self._peer) for name in peers))
        heard = dict(zip(peers, answers, strict=True))
        clients = [*self._clients(request.service), *(client for found in answers for client in found or ())]
        return pb.GetTopologyResponse(
            services=[
                service_to_proto(name, seen[name].values(), self._plane.faults)
                for name in sorted(seen)
                if seen[name] and (not wanted or name in wanted)
            ],
            clients=sorted(clients, key=lambda client: (client.service, client.node_id)),
            permissions=[
                each
                for each in permissions(self._contract, self._plane.intentions)
                if not wanted or {each.caller, each.callee} & wanted
            ],
            control_planes=sorted([self._instance, *(name for name, found in heard.items() if found is not None)]),
            silent_control_planes=[name for name, found in heard.items() if found is None],
            stale=self._plane.follower.distrusted,
        )

    async def ListClients(  # noqa: N802 - the rpc's name
        self, request: pb.ListClientsRequest, _context: object
    ) -> pb.ListClientsResponse:
        return pb.ListClientsResponse(clients=self._clients(request.service))

    def _clients(self, service: str) -> list[pb.Client]:
        names = names_of(service)
        found = [
            client_to_proto(stream, self._instance, self._discovery.publisher.snapshot(stream.node_cluster), names)
            for stream in self._discovery.streams
        ]
        return sorted(found, key=lambda client: (client.service, client.node_id))


async def _clients_of(control: Seen, service: str, peer: Peer) -> list[pb.Client] | None:
    """Return another control plane's clients, None when it does not answer. Not by xDS, which is what it serves."""
    try:
        async with peer(control.meta.get(ADS_META, "")) as channel:
            stub = topology_pb2_grpc.TopologyServiceStub(channel)
            answer = await stub.ListClients(pb.ListClientsRequest(service=service), timeout=PEER_SECONDS)
    except grpc.aio.AioRpcError as error:
        name = control.instance.instance_id
        log.info("the control plane %s does not tell its clients: %s", name, error.code().name)
        return None
    return list(answer.clients)


def names_of(service: str) -> set[str]:
    """Return the names in the registry that are meant by a service's; none for all."""
    return {service, f"{service}-http"} if service else set()


def service_to_proto(name: str, instances: Iterable[Seen], faults: Faults) -> pb.Service:
    ailing = faults.ailing.get(name)
    return pb.Service(
        name=name,
        instances=[instance_to_proto(each) for each in sorted(instances, key=lambda each: each.instance.instance_id)],
        fault=ailing.model_dump_json(exclude_defaults=True) if ailing else "",
        fault_refusal=faults.refused.get(name, ""),
    )


def instance_to_proto(seen: Seen) -> pb.Instance:
    return pb.Instance(
        instance_id=seen.instance.instance_id,
        address=f"{seen.instance.host}:{seen.instance.port}",
        version=seen.instance.version,
        zone=seen.instance.zone,
        health=pb.Instance.Health.Value(f"HEALTH_{seen.status.upper()}"),
        check_output=seen.output,
        since_time=_stamp(seen.since),
        agent=seen.agent,
        process=seen.meta.get("process", ""),
        admin_address=seen.meta.get("admin", ""),
        settings=seen.meta.get("settings", ""),
        settings_refusal=seen.meta.get("settings_refused", ""),
        degradation=seen.meta.get("degraded", ""),
        capacity=seen.meta.get("capacity", ""),
    )


def client_to_proto(stream: Stream, control_plane: str, present: Snapshot | None, names: set[str]) -> pb.Client:
    """Return a stream's state; `names` are the resources to tell one by one."""
    return pb.Client(
        node_id=stream.node_id,
        service=stream.node_cluster,
        zone=stream.zone,
        control_plane=control_plane,
        connect_time=_stamp(stream.connected_at),
        subscriptions=[
            _subscription(type_url, subscription, stream.zone, present, names)
            for type_url, subscription in sorted(stream.subscriptions.items())
        ],
    )


def _subscription(
    type_url: str, subscription: Subscription, zone: str, present: Snapshot | None, names: set[str]
) -> pb.Subscription:
    resources = present.of(type_url, zone) if present else {}
    followed = subscription.wanted(resources).keys() & names
    return pb.Subscription(
        type=type_url.rpartition(".")[2],
        acknowledged_version=subscription.accepted_version,
        sent_version=subscription.sent_version,
        refusal=subscription.refusal,
        refuse_time=_stamp(subscription.refused_at) if subscription.refused_at else None,
        resources=[
            pb.Resource(
                name=name,
                acknowledged_version=subscription.accepted.get(name, ""),
                present_version=resources[name].version,
            )
            for name in sorted(followed)
        ],
    )


def permissions(contract: Contract, intentions: Sequence[Intention]) -> list[pb.Permission]:
    """Return who may call whom, by caller and callee, and what intentions take from that."""
    methods: dict[tuple[str, str], list[str]] = defaultdict(list)
    for method in contract.methods.values():
        edge = () if method.access == "SERVICE" else ("edge",)
        for caller in {*method.callers, *edge}:
            methods[caller, method.owner].append(method.full_name)
    return [
        pb.Permission(caller=caller, callee=callee, methods=sorted(found), denied=denied(intentions, caller, callee))
        for (caller, callee), found in sorted(methods.items())
    ]


def _stamp(moment: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
