"""What the contracts say of their rpcs: policies and HTTP rules, from the image that `scripts/protos` writes.

What they say of fields is in `mesh.bounds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from atelier.policy.v1 import policy_pb2
from google.api import annotations_pb2
from google.protobuf import descriptor_pb2

DEFAULT_MAX_REQUEST_BYTES = 1024 * 1024  # of a JSON body; files go another way (docs/decisions/0005-bytes.md)
IMAGE = Path(policy_pb2.__file__).parents[3] / "image.binpb"

_VERBS = ("get", "put", "post", "delete", "patch")
# A service that the mesh owns is implemented by one of the others.
_OWNERS = {"atelier.mesh.v1.IdentityService": "auth", "atelier.mesh.v1.TopologyService": "control"}


@dataclass(frozen=True, slots=True)
class HttpRule:
    """How an rpc is called in HTTP; `body` is the request's field, `*`, or empty."""

    verb: str
    path: str
    body: str


@dataclass(frozen=True, slots=True)
class Method:
    """One rpc and its policy."""

    full_name: str
    """`/atelier.task.v1.TaskService/GetTask`."""
    service: str
    """`atelier.task.v1.TaskService`."""
    owner: str
    """Name in the registry of the service that implements it: `task`."""
    access: str
    """PUBLIC, USER, ADMIN or SERVICE."""
    callers: frozenset[str]
    """Services that the policy names; where it says `every_service`, all others that have rpcs."""
    deadline_seconds: float
    rate_class: str
    """READ, WRITE, SIGN_IN, BYTES, or empty when not limited."""
    max_request_bytes: int
    audited: bool
    bytes: bool
    """Served by the owner's HTTP listener."""
    signed_url: bool
    """A signed URL may stand in for a token."""
    idempotent: bool
    client_streaming: bool
    server_streaming: bool
    http: HttpRule | None
    request_type: str
    response_type: str

    def allows(self, caller: str) -> bool:
        """Tell whether the policy lets the service `caller` call it."""
        return caller in self.callers or (caller == "edge" and self.access != "SERVICE")


@dataclass(frozen=True, slots=True)
class Contract:
    """Every rpc of an installation, by full name."""

    methods: Mapping[str, Method]

    @classmethod
    def from_image(cls, image: bytes) -> Contract:
        """Read a serialized FileDescriptorSet.

        Raises:
            ValueError: an rpc has no policy, or one that contradicts itself.
        """
        files = descriptor_pb2.FileDescriptorSet.FromString(image)
        services = {
            f"{file.package}.{service.name}": service
            for file in files.file
            if file.package.startswith("atelier.")
            for service in file.service
        }
        owners = frozenset(map(_owner, services))
        methods = [_method(name, method, owners) for name, service in services.items() for method in service.method]
        return cls({method.full_name: method for method in methods})


def _owner(service: str) -> str:
    return _OWNERS.get(service, service.split(".")[1])


def _method(service_name: str, method: descriptor_pb2.MethodDescriptorProto, owners: frozenset[str]) -> Method:
    owner = _owner(service_name)
    full_name = f"/{service_name}/{method.name}"
    policy = method.options.Extensions[policy_pb2.policy]
    access = policy_pb2.Policy.Access.Name(policy.access).removeprefix("ACCESS_")
    rate_class = policy_pb2.Policy.RateClass.Name(policy.rate_class).removeprefix("RATE_CLASS_")
    deadline_seconds = policy.deadline.ToTimedelta().total_seconds()
    if access == "UNSPECIFIED":
        raise ValueError(f"{full_name} has no policy: say who may call it (atelier.policy.v1.policy)")
    if deadline_seconds <= 0:
        raise ValueError(f"{full_name} has no deadline: every rpc needs one")
    if access == "SERVICE" and not policy.callers and not policy.every_service:
        raise ValueError(f"{full_name} is for services but names none in `callers`")
    if access != "SERVICE" and rate_class == "UNSPECIFIED":
        raise ValueError(f"{full_name} is open to people and needs a rate class")
    http = _http_rule(method)
    if policy.bytes and http is None:
        raise ValueError(f"{full_name} is served over HTTP and needs a google.api.http rule")
    if policy.signed_url and access != "USER":
        raise ValueError(f"{full_name} takes signed URLs, which speak for a user, and is not for users")
    return Method(
        full_name=full_name,
        service=service_name,
        owner=owner,
        access=access,
        callers=frozenset(policy.callers) | (owners - {owner} if policy.every_service else frozenset()),
        deadline_seconds=deadline_seconds,
        rate_class="" if rate_class == "UNSPECIFIED" else rate_class,
        max_request_bytes=policy.max_request_bytes or DEFAULT_MAX_REQUEST_BYTES,
        audited=policy.audited,
        bytes=policy.bytes,
        signed_url=policy.signed_url,
        idempotent=method.options.idempotency_level != descriptor_pb2.MethodOptions.IDEMPOTENCY_UNKNOWN,
        client_streaming=method.client_streaming,
        server_streaming=method.server_streaming,
        http=http,
        request_type=method.input_type.removeprefix("."),
        response_type=method.output_type.removeprefix("."),
    )


def _http_rule(method: descriptor_pb2.MethodDescriptorProto) -> HttpRule | None:
    if not method.options.HasExtension(annotations_pb2.http):
        return None
    rule = method.options.Extensions[annotations_pb2.http]
    verb = rule.WhichOneof("pattern")
    if verb not in _VERBS:
        raise ValueError(f"{method.name}: a google.api.http rule must be one of {', '.join(_VERBS)}")
    return HttpRule(verb.upper(), getattr(rule, verb), rule.body)


@cache
def installed() -> Contract:
    """Return the contract that this installation's image holds."""
    return Contract.from_image(IMAGE.read_bytes())
