"""The aggregated discovery service (xDS v3, state of the world) over the newest snapshots."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2

from mesh import status
from mesh.admission import Draining
from mesh.control.snapshot import CLUSTER, ENDPOINTS, EXTENSION, LISTENER, ROUTES, Resource, Snapshot
from mesh.errors import MeshError, PermissionDenied

log = logging.getLogger(__name__)

EDGE = "edge"
"""The node cluster by which Envoy is told apart from gRPC's clients."""

# Make before break: what is referred to goes before what refers to it. A key goes before the routes that need it.
ORDER = (CLUSTER, ENDPOINTS, LISTENER, EXTENSION, ROUTES)
# Of these a response is the whole truth: what it lacks does not exist. Of the others only what changed is sent.
WHOLE = frozenset({LISTENER, CLUSTER})
ANY = "*"


class NodeNotAllowed(PermissionDenied):
    reason = "NODE_NOT_ALLOWED"


@dataclass(slots=True)
class Publisher:
    """Holds the newest snapshots, both at once. A slow reader misses those between, never mixes two."""

    _snapshots: tuple[Snapshot, Snapshot] | None = None
    _waiting: set[asyncio.Event] = field(default_factory=set)

    def publish(self, *, edge: Snapshot, clients: Snapshot) -> None:
        self._snapshots = (edge, clients)
        for event in self._waiting:
            event.set()

    @property
    def published(self) -> bool:
        return self._snapshots is not None

    def snapshot(self, node_cluster: str) -> Snapshot | None:
        """Return what a node may be told; None before the first `publish`."""
        if self._snapshots is None:
            return None
        edge, clients = self._snapshots
        return edge if node_cluster == EDGE else clients

    def subscribe(self, event: asyncio.Event) -> None:
        """Have `event` set at every change."""
        self._waiting.add(event)

    def unsubscribe(self, event: asyncio.Event) -> None:
        self._waiting.discard(event)


@dataclass(slots=True)
class Subscription:
    """What one stream has asked for, been sent and taken over, of one type."""

    names: frozenset[str] = frozenset()
    nonce: str = ""
    sent: Mapping[str, str] = field(default_factory=dict)
    """Name to version, as last sent."""
    sent_version: str = ""
    """Of all that the client is to have after the last response."""
    answered: bool = False
    accepted: Mapping[str, str] = field(default_factory=dict)
    """Name to version, as last acknowledged."""
    accepted_version: str = ""
    refusal: str = ""
    """Why the last response was not taken; empty when it was."""
    refused_at: datetime | None = None

    def wanted(self, resources: Mapping[str, Resource]) -> Mapping[str, Resource]:
        """Return what the client is to have."""
        if ANY in self.names:
            return resources
        return {name: resources[name] for name in self.names if name in resources}

    def due(self, type_url: str, wanted: Mapping[str, Resource]) -> Mapping[str, Resource] | None:
        """Return what to send now: all, or of some types only what has changed. None when there is no news."""
        news = {name: found for name, found in wanted.items() if self.sent.get(name) != found.version}
        if type_url in WHOLE:
            gone = not self.sent.keys() <= wanted.keys()
            return wanted if news or gone or not self.answered else None
        return news or None

    def hear(self, request: discovery_pb2.DiscoveryRequest) -> None:
        """Note whether the client took the newest response."""
        if request.HasField("error_detail"):
            self.refusal, self.refused_at = request.error_detail.message, datetime.now(UTC)
        elif self.nonce:
            self.accepted, self.accepted_version = self.sent, self.sent_version
            self.refusal, self.refused_at = "", None


class Stream:
    """The protocol of one client's stream, without the wire: requests in, responses out.

    Args:
        peer: the service whose certificate the client has shown.
    """

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self.node_id = peer
        self.node_cluster = ""
        self.zone = ""
        self.connected_at = datetime.now(UTC)
        self.subscriptions: dict[str, Subscription] = {}
        self._sequence = 0

    def take(self, request: discovery_pb2.DiscoveryRequest) -> None:
        """Note what a client asks for, accepts or refuses.

        Raises:
            NodeNotAllowed: it says it is somebody else than its certificate does.
        """
        if request.node.id:
            named = request.node.cluster == self._peer and request.node.id.startswith(f"{self._peer}-")
            if not self._peer or not named:
                raise NodeNotAllowed(
                    f"{request.node.cluster}/{request.node.id} is not what the certificate says.",
                    metadata={"node": request.node.id, "cluster": request.node.cluster, "certificate": self._peer},
                )
            self.node_id, self.node_cluster = request.node.id, request.node.cluster
            self.zone = request.node.locality.zone
        subscription = self.subscriptions.setdefault(request.type_url, Subscription())
        if request.HasField("error_detail"):
            # The client keeps its last good one; it hears again only when the content has changed.
            log.error(
                "%s refused %s: %s",
                self.node_id,
                request.type_url,
                request.error_detail.message,
                extra={
                    "node": self.node_id,
                    "type": request.type_url,
                    "resources": sorted(subscription.sent),
                    "nonce": request.response_nonce,
                },
            )
        if request.response_nonce != subscription.nonce:
            return  # it has not seen the newest response yet, and will answer that
        subscription.hear(request)
        # gRPC's clients ask by names of an authority (mesh.channel), which end in ours.
        names = frozenset(name.rpartition("/")[2] for name in request.resource_names)
        if not names and request.type_url in WHOLE and subscription.names <= {ANY}:
            names = frozenset({ANY})  # the older way to ask for all; after names it means none
        subscription.names = names
        subscription.sent = {
            name: version for name, version in subscription.sent.items() if ANY in names or name in names
        }

    def responses(self, snapshot: Snapshot) -> list[discovery_pb2.DiscoveryResponse]:
        """Return what is news to the client, in the order in which it can be taken."""
        responses = []
        for type_url in sorted(self.subscriptions, key=_order):
            subscription = self.subscriptions[type_url]
            wanted = subscription.wanted(snapshot.of(type_url, self.zone))
            due = subscription.due(type_url, wanted)
            if due is None:
                continue
            if type_url == CLUSTER:
                self._await_endpoints(wanted, subscription)
            self._sequence += 1
            subscription.nonce = str(self._sequence)
            subscription.sent = {name: resource.version for name, resource in wanted.items()}
            subscription.sent_version = _version(subscription.sent)
            subscription.answered = True
            responses.append(
                discovery_pb2.DiscoveryResponse(
                    type_url=type_url,
                    version_info=subscription.sent_version,
                    nonce=subscription.nonce,
                    resources=[resource.packed for _, resource in sorted(due.items())],
                )
            )
        return responses

    def _await_endpoints(self, wanted: Mapping[str, Resource], clusters: Subscription) -> None:
        """Have the endpoints of changed clusters sent again: Envoy waits for them before it uses such a cluster."""
        changed = {name for name, resource in wanted.items() if clusters.sent.get(name) != resource.version}
        endpoints = self.subscriptions.get(ENDPOINTS)
        if endpoints is not None:
            endpoints.sent = {name: version for name, version in endpoints.sent.items() if name not in changed}


def _order(type_url: str) -> int:
    return ORDER.index(type_url) if type_url in ORDER else len(ORDER)


def _version(versions: Mapping[str, str]) -> str:
    """Return the same text for the same content, in every control plane."""
    return hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).hexdigest()[:16]


class DiscoveryService(ads_pb2_grpc.AggregatedDiscoveryServiceServicer):  # type: ignore[misc]  # untyped base
    """Serves a `Publisher`'s snapshots to any number of streams.

    Args:
        publisher: has what is served.
        caller: returns the service that makes a call.
    """

    def __init__(self, publisher: Publisher, caller: Callable[[Any], str]) -> None:
        self.publisher = publisher
        self._caller = caller
        self.streams: set[Stream] = set()
        """Those that are open."""
        self._readers: set[asyncio.Task[None]] = set()

    def end_streams(self) -> None:
        """End every open stream: its client keeps what it has and asks another control plane."""
        for reader in self._readers:
            reader.cancel()

    async def StreamAggregatedResources(  # noqa: N802 - the rpc's name
        self, requests: AsyncIterator[discovery_pb2.DiscoveryRequest], context: Any
    ) -> AsyncIterator[discovery_pb2.DiscoveryResponse]:
        stream = Stream(self._caller(context))
        news = asyncio.Event()
        reader = asyncio.create_task(self._read(requests, stream, news))
        self.publisher.subscribe(news)
        self.streams.add(stream)
        self._readers.add(reader)
        try:
            while not reader.done():
                await news.wait()
                news.clear()
                snapshot = self.publisher.snapshot(stream.node_cluster)
                if snapshot is None:
                    continue  # the first one wakes this stream
                for response in stream.responses(snapshot):
                    yield response  # waits while the client does not read
            draining = Draining("This control plane stops; ask another.")
            failure = draining if reader.cancelled() else reader.exception()
            if isinstance(failure, NodeNotAllowed):
                log.warning("%s", failure.message)
            if isinstance(failure, MeshError):
                code = status.GRPC_CODES[failure.code_number]
                await context.abort(code, failure.message, status.to_trailers(failure))
        finally:
            self.publisher.unsubscribe(news)
            self.streams.discard(stream)
            self._readers.discard(reader)
            reader.cancel()

    @staticmethod
    async def _read(
        requests: AsyncIterator[discovery_pb2.DiscoveryRequest], stream: Stream, news: asyncio.Event
    ) -> None:
        try:
            async for request in requests:
                stream.take(request)
                news.set()
        finally:
            news.set()  # ends the writer, too
