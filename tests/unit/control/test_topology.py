"""What people are shown of the mesh."""

from __future__ import annotations

from datetime import UTC, datetime

from atelier.mesh.v1 import topology_pb2 as pb
from envoy.service.discovery.v3 import discovery_pb2

from mesh.contract import installed
from mesh.control.catalog import Instance, Seen
from mesh.control.faults import Fault, Faults
from mesh.control.server import Stream
from mesh.control.snapshot import ENDPOINTS, Snapshot, snapshot
from mesh.control.topology import client_to_proto, permissions, service_to_proto
from mesh.intentions import Intention

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


def world(*ports: int) -> Snapshot:
    return snapshot(
        {ENDPOINTS: {"task": {"cluster_name": "task", "named_endpoints": {str(port): {} for port in ports}}}}
    )


def asked(nonce: str = "", refusing: str = "") -> discovery_pb2.DiscoveryRequest:
    request = discovery_pb2.DiscoveryRequest(
        type_url=ENDPOINTS, resource_names=["task", "user"], response_nonce=nonce,
        node={"id": "user-1", "cluster": "user", "locality": {"zone": "a"}},
    )  # fmt: skip
    if refusing:
        request.error_detail.message = refusing
    return request


def test_a_client_is_shown_with_what_it_has_and_what_it_should_have() -> None:
    stream = Stream("user")
    stream.take(asked())
    (response,) = stream.responses(world(1))
    stream.take(asked(response.nonce))
    (later,) = stream.responses(world(1, 2))

    shown = client_to_proto(stream, "control-1", world(1, 2), {"task", "task-http"})

    assert (shown.node_id, shown.service, shown.zone, shown.control_plane) == ("user-1", "user", "a", "control-1")
    (subscription,) = shown.subscriptions
    assert subscription.type == "ClusterLoadAssignment"
    assert subscription.acknowledged_version == response.version_info
    assert subscription.sent_version == later.version_info
    (resource,) = subscription.resources
    assert (resource.name, resource.acknowledged_version) == ("task", world(1).of(ENDPOINTS)["task"].version)
    assert resource.present_version == world(1, 2).of(ENDPOINTS)["task"].version


def test_a_refusal_is_shown_until_the_next_is_taken() -> None:
    stream = Stream("user")
    stream.take(asked())
    (response,) = stream.responses(world(1))
    stream.take(asked(response.nonce, refusing="no such thing"))

    (refused,) = client_to_proto(stream, "control-1", world(1), set()).subscriptions
    (response,) = stream.responses(world(2))
    stream.take(asked(response.nonce))
    (taken,) = client_to_proto(stream, "control-1", world(2), set()).subscriptions

    assert (refused.refusal, refused.acknowledged_version) == ("no such thing", "")
    assert refused.refuse_time.seconds
    assert (taken.refusal, taken.acknowledged_version) == ("", taken.sent_version)
    assert not taken.HasField("refuse_time")


def test_an_instance_is_shown_with_its_check_its_process_and_its_settings() -> None:
    meta = {"process": "7", "admin": "127.0.0.1:9", "settings": "{}", "settings_refused": "no", "degraded": "slow"}
    meta["capacity"] = '{"slots": 2}'
    seen = Seen(Instance("h", 1, "task-1", "0.1.0", "a"), "critical", "refused", NOON, "agent-1", meta)
    faults = Faults({"task": Fault(abort_code="INTERNAL", abort_fraction=1)}, {"task": "bad"})

    shown = service_to_proto("task", [seen], faults)

    assert shown.fault == '{"abort_code":"INTERNAL","abort_fraction":1.0}'
    assert shown.fault_refusal == "bad"
    (instance,) = shown.instances
    assert instance.address == "h:1"
    assert instance.health == pb.Instance.HEALTH_CRITICAL
    assert instance.since_time.ToDatetime(UTC) == NOON
    assert (instance.agent, instance.process, instance.admin_address) == ("agent-1", "7", "127.0.0.1:9")
    assert (instance.settings, instance.settings_refusal, instance.degradation) == ("{}", "no", "slow")
    assert instance.capacity == '{"slots": 2}'


def test_permissions_are_what_the_policies_say() -> None:
    found = {(each.caller, each.callee): list(each.methods) for each in permissions(installed(), [])}

    assert "/atelier.user.v1.UserService/ReserveQuota" in found["task", "user"]
    assert ("media", "user") not in found
    assert found["control", "control"] == ["/atelier.mesh.v1.TopologyService/ListClients"]
    assert "/atelier.mesh.v1.TopologyService/ListClients" not in found["edge", "control"]


def test_permissions_say_what_an_intention_takes() -> None:
    intentions = [Intention("edge", "storage", 9, allows=False), Intention("media", "user", 9, allows=True)]

    found = permissions(installed(), intentions)

    assert [(each.caller, each.callee) for each in found if each.denied] == [("edge", "storage")]
    assert ("media", "user") not in {(each.caller, each.callee) for each in found}


def test_a_bad_fault_leaves_the_last_good_one_and_a_deleted_one_is_gone() -> None:
    first = Faults().after([("task", b'{"abort_code": "INTERNAL", "abort_fraction": 1}'), ("user", b"{")])

    second = first.after([("task", b'{"abort_code": "BAD", "abort_fraction": 1}')])
    third = second.after([])

    assert set(first.ailing) == {"task"}
    assert set(first.refused) == {"user"}
    assert second.ailing == first.ailing
    assert "abort_code" in second.refused["task"]
    assert third == Faults()
