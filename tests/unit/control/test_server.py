"""The discovery protocol, with a client that is a list of requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
from envoy.service.discovery.v3 import discovery_pb2
from google.protobuf import symbol_database

from mesh.control.server import DiscoveryService, NodeNotAllowed, Publisher, Stream
from mesh.control.snapshot import CLUSTER, ENDPOINTS, LISTENER, ROUTES, Snapshot, cluster, snapshot


def listener(name: str) -> dict:
    return {"name": name}


def routes(name: str, version: int = 1) -> dict:
    return {"name": name, "virtual_hosts": [{"name": str(version), "domains": ["*"]}]}


def endpoints(name: str) -> dict:
    return {"cluster_name": name}


def world(*names: str, version: int = 1) -> Snapshot:
    return snapshot(
        {
            LISTENER: {name: listener(name) for name in names},
            ROUTES: {name: routes(name, version) for name in names},
            CLUSTER: {name: cluster(name, {}) for name in names},
            ENDPOINTS: {name: endpoints(name) for name in names},
        }
    )


class Client:
    """Speaks as an xDS client does: one subscription a type, an answer to each response."""

    def __init__(self, cluster_name: str = "task") -> None:
        self.stream = Stream(cluster_name)
        self._node = {"id": f"{cluster_name}-1", "cluster": cluster_name}
        self._names: dict[str, tuple[str, ...]] = {}

    def ask(self, type_url: str, *names: str, nonce: str = "", refusing: str = "") -> None:
        self._names[type_url] = names
        request = discovery_pb2.DiscoveryRequest(
            type_url=type_url, resource_names=names, response_nonce=nonce, node=self._node
        )
        if refusing:
            request.error_detail.message = refusing
        self.stream.take(request)

    def hear(self, told: Snapshot, *, refusing: str = "") -> list[tuple[str, list[str]]]:
        """Return the types and names of what is sent, and acknowledge or refuse it."""
        responses = self.stream.responses(told)
        for response in responses:
            self.ask(response.type_url, *self._names[response.type_url], nonce=response.nonce, refusing=refusing)
        return [(response.type_url, _names(response)) for response in responses]


def _names(response: discovery_pb2.DiscoveryResponse) -> list[str]:
    names = []
    for packed in response.resources:
        message = symbol_database.Default().GetSymbol(packed.type_url.partition("/")[2])()
        packed.Unpack(message)
        names.append(message.cluster_name if response.type_url == ENDPOINTS else message.name)
    return names


def test_a_client_is_sent_what_it_asks_for_and_no_more() -> None:
    client = Client()
    client.ask(LISTENER, "task")

    assert client.hear(world("task", "user")) == [(LISTENER, ["task"])]


def test_nothing_is_sent_when_nothing_changed() -> None:
    client = Client()
    client.ask(LISTENER, "task")
    client.ask(ROUTES, "task")
    client.hear(world("task"))

    assert client.hear(world("task")) == []


def test_nothing_is_sent_when_only_others_changed() -> None:
    client = Client()
    client.ask(ROUTES, "task")
    client.hear(world("task"))

    assert client.hear(world("task", "user")) == []


def test_only_the_type_that_changed_is_sent() -> None:
    client = Client()
    for type_url in (LISTENER, ROUTES, CLUSTER, ENDPOINTS):
        client.ask(type_url, "task")
    client.hear(world("task"))

    assert client.hear(world("task", version=2)) == [(ROUTES, ["task"])]


def test_equal_content_has_an_equal_version_in_every_control_plane() -> None:
    first, second = Client(), Client()
    for client in (first, second):
        client.ask(ROUTES, "task")

    versions = [client.stream.responses(world("task"))[0].version_info for client in (first, second)]

    assert versions[0] == versions[1]


def test_what_is_refused_is_not_sent_again_until_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    client = Client()
    client.ask(ROUTES, "task")
    with caplog.at_level(logging.ERROR):
        client.hear(world("task"), refusing="virtual host 1: no routes")

    assert client.hear(world("task")) == []
    assert client.hear(world("task", version=2)) != []
    (record,) = caplog.records
    assert (record.node, record.type, record.resources) == ("task-1", ROUTES, ["task"])
    assert "no routes" in record.getMessage()


def test_an_answer_to_an_older_response_changes_nothing() -> None:
    client = Client()
    client.ask(ROUTES, "task")
    client.stream.responses(world("task"))
    client.stream.responses(world("task", version=2))

    client.ask(ROUTES, nonce="1")

    assert client.hear(world("task", version=3)) == [(ROUTES, ["task"])]


def test_a_name_that_does_not_exist_is_answered_with_its_absence_and_sent_when_it_appears() -> None:
    client = Client()
    client.ask(LISTENER, "notification")

    assert client.hear(world("task")) == [(LISTENER, [])]
    assert client.hear(world("task")) == []
    assert client.hear(world("task", "notification")) == [(LISTENER, ["notification"])]


def test_endpoints_that_do_not_exist_are_no_news() -> None:
    client = Client()
    client.ask(ENDPOINTS, "notification")

    assert client.hear(world("task")) == []


def test_asking_for_one_more_name_is_answered_at_once() -> None:
    client = Client()
    client.ask(ENDPOINTS, "task")
    client.hear(world("task", "user"))

    client.ask(ENDPOINTS, "task", "user", nonce="1")

    assert client.hear(world("task", "user")) == [(ENDPOINTS, ["user"])]


def test_of_endpoints_only_those_that_changed_are_sent_under_a_version_of_all() -> None:
    client = Client()
    client.ask(ENDPOINTS, "task", "user")
    client.hear(world("task", "user"))
    changed = snapshot({ENDPOINTS: {"task": endpoints("task"), "user": {**endpoints("user"), "policy": {}}}})
    newcomer = Client()
    newcomer.ask(ENDPOINTS, "task", "user")

    assert client.hear(changed) == [(ENDPOINTS, ["user"])]
    assert client.hear(changed) == []
    newcomer.hear(changed)
    assert (
        client.stream.subscriptions[ENDPOINTS].accepted_version
        == newcomer.stream.subscriptions[ENDPOINTS].accepted_version
    )


def test_what_was_acknowledged_stays_known_when_the_next_is_refused() -> None:
    client = Client()
    client.ask(ROUTES, "task")
    client.hear(world("task"))
    good = client.stream.subscriptions[ROUTES].accepted_version

    client.hear(world("task", version=2), refusing="no routes")

    found = client.stream.subscriptions[ROUTES]
    assert (found.accepted_version, found.refusal) == (good, "no routes")
    assert found.sent_version != good
    assert found.refused_at


def test_asking_for_one_name_less_needs_no_answer() -> None:
    client = Client()
    client.ask(ENDPOINTS, "task", "user")
    client.hear(world("task", "user"))

    client.ask(ENDPOINTS, "task", nonce="1")

    assert client.hear(world("task", "user")) == []


def test_no_names_mean_all_at_first_and_none_later() -> None:
    everything, nothing = Client(), Client()
    everything.ask(CLUSTER)
    nothing.ask(CLUSTER, "task")
    nothing.hear(world("task"))
    nothing.ask(CLUSTER, nonce="1")

    assert everything.hear(world("task", "user")) == [(CLUSTER, ["task", "user"])]
    assert nothing.hear(world("task", "user")) == []


def test_clusters_come_before_endpoints_and_routes_last() -> None:
    client = Client("edge")
    for type_url in (ROUTES, LISTENER, ENDPOINTS, CLUSTER):
        client.ask(type_url, "task")

    assert [type_url for type_url, _ in client.hear(world("task"))] == [CLUSTER, ENDPOINTS, LISTENER, ROUTES]


def test_a_changed_clusters_endpoints_are_sent_again() -> None:
    client = Client("edge")
    client.ask(CLUSTER)
    client.ask(ENDPOINTS, "task")
    client.hear(world("task"))
    told = world("task")
    changed = snapshot(
        {CLUSTER: {"task": {**cluster("task", {}), "connect_timeout": "2s"}}, ENDPOINTS: {"task": endpoints("task")}}
    )

    assert [type_url for type_url, _ in client.hear(changed)] == [CLUSTER, ENDPOINTS]
    assert told.of(ENDPOINTS)["task"].version == changed.of(ENDPOINTS)["task"].version


def test_what_is_no_message_of_its_type_is_refused() -> None:
    with pytest.raises(ValueError, match="RouteConfiguration"):
        snapshot({ROUTES: {"task": {"nmae": "task"}}})


class Wire:
    """A stream of requests that ends when it is told to."""

    def __init__(self) -> None:
        self.requests: asyncio.Queue[discovery_pb2.DiscoveryRequest | None] = asyncio.Queue()

    def peer(self) -> str:
        return "test"

    async def __aiter__(self) -> AsyncIterator[discovery_pb2.DiscoveryRequest]:
        while (request := await self.requests.get()) is not None:
            yield request


def asked(type_url: str, cluster_name: str) -> discovery_pb2.DiscoveryRequest:
    return discovery_pb2.DiscoveryRequest(type_url=type_url, node={"id": f"{cluster_name}-1", "cluster": cluster_name})


async def test_a_stream_waits_for_the_first_snapshot() -> None:
    publisher, wire = Publisher(), Wire()
    responses = DiscoveryService(publisher, lambda _: "task").StreamAggregatedResources(wire.__aiter__(), wire)
    wire.requests.put_nowait(asked(CLUSTER, "task"))
    first = asyncio.create_task(anext(responses))
    await asyncio.sleep(0.05)
    early = first.done()

    publisher.publish(edge=world("edge"), clients=world("task"))

    assert not early
    assert len((await first).resources) == 1
    await responses.aclose()


async def test_envoy_and_grpc_clients_are_told_different_things() -> None:
    publisher = Publisher()
    publisher.publish(edge=world("one"), clients=world("one", "two"))
    counts = []

    for cluster_name in ("edge", "task"):
        wire = Wire()
        wire.requests.put_nowait(asked(CLUSTER, cluster_name))
        service = DiscoveryService(publisher, lambda _, peer=cluster_name: peer)
        responses = service.StreamAggregatedResources(wire.__aiter__(), wire)
        counts.append(len((await anext(responses)).resources))
        await responses.aclose()

    assert counts == [1, 2]


async def test_a_slow_client_gets_the_newest_and_none_between() -> None:
    publisher, wire = Publisher(), Wire()
    publisher.publish(edge=world(), clients=world("task"))
    responses = DiscoveryService(publisher, lambda _: "task").StreamAggregatedResources(wire.__aiter__(), wire)
    wire.requests.put_nowait(asked(CLUSTER, "task"))
    await anext(responses)

    for count in range(2, 50):
        publisher.publish(edge=world(), clients=world(*(f"task{number}" for number in range(count))))

    assert len((await anext(responses)).resources) == 49
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(responses), 0.1)


async def test_a_stream_ends_when_its_client_goes() -> None:
    publisher, wire = Publisher(), Wire()
    publisher.publish(edge=world(), clients=world("task"))
    wire.requests.put_nowait(asked(CLUSTER, "task"))
    wire.requests.put_nowait(None)

    heard = [
        response
        async for response in DiscoveryService(publisher, lambda _: "task").StreamAggregatedResources(
            wire.__aiter__(), wire
        )
    ]

    assert len(heard) <= 1


@pytest.mark.parametrize(
    "node",
    [{"id": "task-1", "cluster": "user"}, {"id": "user-1", "cluster": "task"}, {"id": "edge-1", "cluster": "edge"}],
)
@pytest.mark.parametrize("peer", ["task", ""])
def test_a_node_that_its_certificate_does_not_name_is_told_nothing(node: dict[str, str], peer: str) -> None:
    stream = Stream(peer)

    with pytest.raises(NodeNotAllowed) as refused:
        stream.take(discovery_pb2.DiscoveryRequest(type_url=CLUSTER, node=node))

    assert refused.value.metadata["certificate"] == peer
    assert stream.responses(world("task")) == []
