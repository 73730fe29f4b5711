"""What every contract must say of its rpcs and fields, and what is refused when it does not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import pytest
from atelier.policy.v1 import policy_pb2
from google.api import annotations_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, duration_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from mesh import contract
from mesh.bounds import DURATION
from mesh.contract import Contract, Method
from scripts.local import layout

SERVICES = {*layout.SERVICES, *layout.WORKERS, "control"}
METHODS = list(contract.installed().methods.values())
IMAGE = descriptor_pb2.FileDescriptorSet.FromString(contract.IMAGE.read_bytes())
NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE,
}  # fmt: skip
LARGEST_REQUEST_BYTES = 4 * 1024 * 1024  # gRPC receives no more

USER = policy_pb2.Policy(
    access=policy_pb2.Policy.ACCESS_USER,
    deadline=duration_pb2.Duration(seconds=5),
    rate_class=policy_pb2.Policy.RATE_CLASS_READ,
)


def image(policy: policy_pb2.Policy | None, http: tuple[str, str] | None = None, **method: object) -> bytes:
    """Return a contract of one rpc, `atelier.thing.v1.ThingService/GetThing`."""
    file = descriptor_pb2.FileDescriptorProto(name="thing.proto", package="atelier.thing.v1")
    rpc = file.service.add(name="ThingService").method.add(name="GetThing", input_type=".In", output_type=".Out")
    if policy is not None:
        rpc.options.Extensions[policy_pb2.policy].CopyFrom(policy)
    if http is not None:
        setattr(rpc.options.Extensions[annotations_pb2.http], *http)
    for name, value in method.items():
        setattr(rpc, name, value)
    return descriptor_pb2.FileDescriptorSet(file=[file]).SerializeToString()


def changed(**fields: object) -> policy_pb2.Policy:
    """Return a policy that is right but for `fields`."""
    policy = policy_pb2.Policy()
    policy.CopyFrom(USER)
    for name, value in fields.items():
        policy.ClearField(name)
        if value is not None:
            policy.MergeFrom(policy_pb2.Policy(**{name: value}))
    return policy


def test_every_rpc_of_every_first_party_service_is_in_the_contract() -> None:
    declared = {
        f"/{file.package}.{service.name}/{method.name}"
        for file in IMAGE.file
        if file.package.startswith("atelier.")
        for service in file.service
        for method in service.method
    }

    assert {method.full_name for method in METHODS} == declared
    assert len(declared) > 30


def test_no_two_rpcs_share_a_verb_and_a_path() -> None:
    routes = Counter(
        (method.http.verb, re.sub(r"\{[^}]*\}", "{}", method.http.path)) for method in METHODS if method.http
    )

    assert [route for route, count in routes.items() if count > 1] == []


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_a_policy_makes_sense(method: Method) -> None:
    assert method.owner in SERVICES - layout.WORKERS.keys()
    assert method.callers <= SERVICES
    assert method.owner not in method.callers or method.owner == "control"  # control planes ask each other
    assert not method.client_streaming
    if method.access == "SERVICE":
        assert method.http is None or method.http.path.startswith("/internal/")
        assert not method.allows("edge")
    else:
        assert method.rate_class in {"READ", "WRITE", "SIGN_IN", "BYTES"}
        assert method.http is None or method.http.path.startswith("/api/v1/")
    assert method.bytes or method.rate_class != "BYTES"
    assert method.bytes or method.max_request_bytes <= LARGEST_REQUEST_BYTES
    if method.http and method.http.verb in {"GET", "PUT", "DELETE"}:
        assert method.idempotent


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_only_those_whom_the_policy_names_may_call(method: Method) -> None:
    allowed = {caller for caller in {*SERVICES, "edge", "", "Edge", "stranger"} if method.allows(caller)}

    assert allowed == method.callers | ({"edge"} if method.access != "SERVICE" else set())


def test_whoever_serves_rpcs_may_hear_which_tokens_are_good() -> None:
    feed = contract.installed().methods["/atelier.mesh.v1.IdentityService/WatchIdentity"]

    assert feed.callers == {method.owner for method in METHODS} - {"auth"}


def test_who_changes_an_account_or_a_key_is_audited() -> None:
    silent = [
        method.full_name
        for method in METHODS
        if (method.access == "ADMIN" or method.rate_class == "SIGN_IN") and not method.audited
    ]

    assert silent == []


def test_a_policy_is_read_whole() -> None:
    policy = changed(
        access=policy_pb2.Policy.ACCESS_USER,
        callers=["task", "media"],
        deadline=duration_pb2.Duration(seconds=2, nanos=500_000_000),
        max_request_bytes=10,
        audited=True,
        bytes=True,
        signed_url=True,
    )

    method = Contract.from_image(image(policy, ("post", "/api/v1/things"), server_streaming=True)).methods[
        "/atelier.thing.v1.ThingService/GetThing"
    ]

    assert method == Method(
        full_name="/atelier.thing.v1.ThingService/GetThing",
        service="atelier.thing.v1.ThingService",
        owner="thing",
        access="USER",
        callers=frozenset({"task", "media"}),
        deadline_seconds=2.5,
        rate_class="READ",
        max_request_bytes=10,
        audited=True,
        bytes=True,
        signed_url=True,
        idempotent=False,
        client_streaming=False,
        server_streaming=True,
        http=contract.HttpRule("POST", "/api/v1/things", ""),
        request_type="In",
        response_type="Out",
    )


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (None, "no policy"),
        (changed(access=None), "no policy"),
        (changed(deadline=None), "no deadline"),
        (changed(deadline=duration_pb2.Duration(seconds=-1)), "no deadline"),
        (changed(access=policy_pb2.Policy.ACCESS_SERVICE), "names none in `callers`"),
        (changed(rate_class=None), "needs a rate class"),
        (changed(access=policy_pb2.Policy.ACCESS_PUBLIC, rate_class=None), "needs a rate class"),
        (changed(access=policy_pb2.Policy.ACCESS_ADMIN, rate_class=None), "needs a rate class"),
        (changed(bytes=True), "needs a google.api.http rule"),
        (changed(access=policy_pb2.Policy.ACCESS_PUBLIC, signed_url=True), "is not for users"),
    ],
)
def test_a_policy_that_lacks_something_is_refused(policy, words) -> None:
    with pytest.raises(ValueError, match=f"/atelier.thing.v1.ThingService/GetThing .*{words}"):
        Contract.from_image(image(policy))


def test_services_of_others_need_no_policy() -> None:
    files = descriptor_pb2.FileDescriptorSet.FromString(image(None))
    files.file[0].package = "grpc.health.v1"

    assert Contract.from_image(files.SerializeToString()).methods == {}


def _requests() -> list[Descriptor]:
    """Return every message type that a request can hold, ours only."""
    pool = descriptor_pool.DescriptorPool()
    for file in IMAGE.file:
        pool.Add(file)
    found: dict[str, Descriptor] = {}
    waiting = [pool.FindMessageTypeByName(method.request_type) for method in METHODS]
    while waiting:
        message = waiting.pop()
        if message.full_name not in found and not message.full_name.startswith("google."):
            found[message.full_name] = message
            waiting += [field.message_type for field in message.fields if field.message_type]
    return list(found.values())


def _unchecked(field: FieldDescriptor) -> Iterator[str]:
    """Say what of a field mesh.bounds would not check, or check wrongly."""
    bounds = field.GetOptions().Extensions[policy_pb2.bounds]
    is_text = field.type == FieldDescriptor.TYPE_STRING
    has_length = is_text or field.is_repeated or field.type == FieldDescriptor.TYPE_BYTES
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        yield "a map is not looked into"
    if field.enum_type is not None and field.is_repeated:
        yield "unknown numbers in a repeated enum are not noticed"
    is_number = field.cpp_type in NUMBERS or (field.message_type and field.message_type.full_name == DURATION)
    if (bounds.HasField("min") or bounds.HasField("max")) and (not is_number or field.is_repeated):
        yield "min and max are for a number or a duration"
    if (bounds.HasField("min_length") or bounds.HasField("max_length")) and not has_length:
        yield "this has no length"
    if bounds.pattern and (not is_text or field.is_repeated):
        yield "a pattern is for a string"
    if re.search(r"\\[dwsbDWSB]", bounds.pattern):
        yield "in RE2 this class is ASCII, in Python it is not"
    if bounds.file and not is_text:
        yield "a file's id is a string"
    if bounds.required and field.message_type is None and field.has_presence and not is_text:
        yield "a 0 that was sent would be taken for one that was not"


def test_every_bound_of_a_requests_field_is_of_a_kind_that_is_checked() -> None:
    wrong = [(field.full_name, why) for message in _requests() for field in message.fields for why in _unchecked(field)]

    assert wrong == []


def test_the_rules_of_a_request_fit_its_fields() -> None:
    for message in _requests():
        rules = message.GetOptions().Extensions[policy_pb2.rules]

        assert all(message.fields_by_name[name].has_presence for group in rules.any_of for name in group.fields)
        assert not rules.oneof_required or len([each for each in message.oneofs if len(each.fields) > 1]) == 1
