"""Compiles the catalog into what gRPC's xDS clients are told. Pure.

Resources are written as the JSON form of Envoy's messages, as in Envoy's own documentation, and parsed once: the
same content has the same version in every control plane.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from itertools import groupby
from types import MappingProxyType
from typing import Any

from google.protobuf import any_pb2, json_format, symbol_database

from mesh.channel import PROVIDER, xds_name
from mesh.contract import Contract
from mesh.control import faults
from mesh.control.catalog import Catalog, Instance
from mesh.control.faults import Fault

Spec = Mapping[str, Any]
SpiffeId = Callable[[str], str]

_PREFIX = "type.googleapis.com/"
ENVOY = f"{_PREFIX}envoy"
LISTENER = f"{ENVOY}.config.listener.v3.Listener"
ROUTES = f"{ENVOY}.config.route.v3.RouteConfiguration"
CLUSTER = f"{ENVOY}.config.cluster.v3.Cluster"
ENDPOINTS = f"{ENVOY}.config.endpoint.v3.ClusterLoadAssignment"
EXTENSION = f"{ENVOY}.config.core.v3.TypedExtensionConfig"

# The parser finds a message by its type URL once its module is loaded.
for _module in (
    "config.cluster.v3.cluster",
    "config.core.v3.extension",
    "config.endpoint.v3.endpoint",
    "config.listener.v3.listener",
    "config.route.v3.route",
    "extensions.access_loggers.filters.cel.v3.cel",
    "extensions.access_loggers.stream.v3.stream",
    "extensions.compression.gzip.compressor.v3.gzip",
    "extensions.filters.http.buffer.v3.buffer",
    "extensions.filters.http.compressor.v3.compressor",
    "extensions.filters.http.cors.v3.cors",
    "extensions.filters.http.fault.v3.fault",
    "extensions.filters.http.grpc_json_transcoder.v3.transcoder",
    "extensions.filters.http.grpc_web.v3.grpc_web",
    "extensions.filters.http.jwt_authn.v3.config",
    "extensions.filters.http.local_ratelimit.v3.local_rate_limit",
    "extensions.filters.http.rbac.v3.rbac",
    "extensions.filters.http.router.v3.router",
    "extensions.filters.network.http_connection_manager.v3.http_connection_manager",
    "extensions.http.early_header_mutation.header_mutation.v3.header_mutation",
    "extensions.retry.host.previous_hosts.v3.previous_hosts",
    "extensions.transport_sockets.tls.v3.tls",
    "extensions.upstreams.http.v3.http_protocol_options",
):
    import_module(f"envoy.{_module}_pb2")

ADS: Spec = {"ads": {}, "resource_api_version": "V3"}
CONNECT_TIMEOUT = "1s"  # within one machine room; a dead host answers a call in no more than this
MAX_REQUESTS = 10_000  # to a service at a time, of one caller; an open stream is one, so this counts watchers, too

# An instance that passes its check and yet fails its callers gets no calls for a while; never more than half of them,
# for when most fail, the cause lies elsewhere. Envoy counts failures in a row. gRPC's clients cannot; they compare
# shares, and take every status but OK for a failure, so only an instance that fails nearly always is meant.
_OUTLIERS: Spec = {
    "interval": "5s",
    "base_ejection_time": "10s",
    "max_ejection_time": "60s",
    "max_ejection_percent": 50,
    "consecutive_5xx": 10,
    "enforcing_consecutive_5xx": 100,
    "consecutive_gateway_failure": 5,
    "enforcing_consecutive_gateway_failure": 100,
    "success_rate_minimum_hosts": 5,  # with fewer, a deviation means nothing
    "success_rate_request_volume": 100,
    "failure_percentage_minimum_hosts": 2,
    "failure_percentage_request_volume": 20,
    "failure_percentage_threshold": 85,
    "enforcing_failure_percentage": 100,
}


@dataclass(frozen=True, slots=True)
class Resource:
    """One xDS resource, ready to send. Equal `version`s mean equal content."""

    packed: any_pb2.Any
    version: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that one kind of client may ask for: type URL to name to resource.

    `zones` has the endpoints as a client of that zone is to use them.
    """

    resources: Mapping[str, Mapping[str, Resource]]
    zones: Mapping[str, Mapping[str, Resource]] = field(default_factory=dict)

    def of(self, type_url: str, zone: str = "") -> Mapping[str, Resource]:
        if type_url == ENDPOINTS and zone in self.zones:
            return self.zones[zone]
        return self.resources.get(type_url, {})


def snapshot(specs: Mapping[str, Mapping[str, Spec | Resource]]) -> Snapshot:
    """Parse and version resources.

    Args:
        specs: type URL to name to the JSON form of the resource, or to the resource if it is made already.

    Raises:
        ValueError: one of them is not a valid message of its type.
    """
    return Snapshot(
        {
            type_url: {
                name: spec if isinstance(spec, Resource) else _resource(type_url, json.dumps(spec, sort_keys=True))
                for name, spec in named.items()
            }
            for type_url, named in specs.items()
        }
    )


@lru_cache(maxsize=512)  # a health change alters one resource of dozens; the others are not parsed again
def _resource(type_url: str, text: str) -> Resource:
    message = symbol_database.Default().GetSymbol(type_url.removeprefix(_PREFIX))()
    try:
        json_format.Parse(text, message)
    except json_format.ParseError as error:
        raise ValueError(f"not a {type_url}: {error}") from error
    packed = any_pb2.Any()
    packed.Pack(message)
    return Resource(packed, hashlib.sha256(text.encode()).hexdigest()[:16])


def grpc_clients(
    catalog: Catalog,
    contract: Contract,
    spiffe_id: SpiffeId,
    ailing: Mapping[str, Fault] = MappingProxyType({}),
    max_requests: int = MAX_REQUESTS,
) -> Snapshot:
    """Compile what `xds:///<service>` resolves to, for every service of the contract and of the catalog.

    Routes carry no timeouts: gRPC's client fails every call at once with them. The caller's channel sets deadlines.

    Args:
        catalog: passing instances.
        contract: says which calls may be repeated.
        spiffe_id: returns how a service is called in its certificate.
        ailing: faults by service.
        max_requests: to one service at a time, of one client.
    """
    names = {method.owner for method in contract.methods.values()} | set(catalog)
    told = snapshot(
        {
            LISTENER: {name: _api_listener(name) for name in names},
            ROUTES: {name: _routes(name, contract, ailing.get(name)) for name in names},
            CLUSTER: {
                name: {
                    **cluster(called(ENDPOINTS, name), _by_provider(spiffe_id(name)), max_requests),
                    "name": called(CLUSTER, name),
                }
                for name in names
            },
        }
    )
    return with_endpoints(told, {name: called(ENDPOINTS, name) for name in names}, catalog)


def called(type_url: str, name: str) -> str:
    """Return how gRPC's clients call what a snapshot has as `name`."""
    return xds_name(type_url.removeprefix(_PREFIX), name)


def with_endpoints(told: Snapshot, names: Mapping[str, str], catalog: Catalog) -> Snapshot:
    """Return `told` with the endpoints of services, plain and for each zone that has some.

    Args:
        told: what it has of other types.
        names: service to what its endpoints are called.
        catalog: passing instances.
    """
    found = {name: tuple(catalog.get(name, ())) for name in names}
    zones = {instance.zone for instances in found.values() for instance in instances} - {""}

    def of_zone(zone: str) -> Mapping[str, Resource]:
        return {name: _compiled_endpoints(names[name], instances, zone) for name, instances in found.items()}

    return Snapshot({**told.resources, ENDPOINTS: of_zone("")}, {zone: of_zone(zone) for zone in zones})


# A change is in one service of dozens: of the others not even the JSON form is made again.
@lru_cache(maxsize=4096)
def _compiled_endpoints(name: str, instances: tuple[Instance, ...], zone: str) -> Resource:
    return _resource(ENDPOINTS, json.dumps(endpoints(name, instances, zone), sort_keys=True))


def _api_listener(name: str) -> Spec:
    return {
        "name": called(LISTENER, name),
        "api_listener": {
            "api_listener": {
                "@type": f"{ENVOY}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "rds": {"config_source": ADS, "route_config_name": called(ROUTES, name)},
                "http_filters": [
                    {"name": faults.FAULT, "typed_config": faults.NONE},  # routes say what ails
                    {"name": "router", "typed_config": {"@type": f"{ENVOY}.extensions.filters.http.router.v3.Router"}},
                ],
            }
        },
    }


def _routes(name: str, contract: Contract, ailing: Fault | None) -> Spec:
    to = called(CLUSTER, name)
    retried = [
        {
            "match": {"path": method.full_name},
            "route": {
                "cluster": to,
                "retry_policy": {
                    "retry_on": "unavailable",
                    "num_retries": 3,
                    "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
                },
            },
        }
        for method in sorted(contract.methods.values(), key=lambda method: method.full_name)
        if method.owner == name and method.idempotent
    ]
    others = {"match": {"prefix": ""}, "route": {"cluster": to}}
    host: dict[str, Any] = {"name": name, "domains": ["*"], "routes": [*retried, others]}
    if ailing:
        host["typed_per_filter_config"] = {faults.FAULT: ailing.filter(http=False)}
    return {"name": called(ROUTES, name), "virtual_hosts": [host]}


def _by_provider(spiffe_id: str) -> Spec:
    """Return TLS by the certificates that the client's bootstrap names, with nobody but `spiffe_id`."""
    provider = {"instance_name": PROVIDER}
    return {
        "tls_certificate_provider_instance": provider,
        "validation_context": {
            "ca_certificate_provider_instance": provider,
            # The older field, though deprecated: gRPC reads no other, and would take any service of the mesh for this.
            "match_subject_alt_names": [{"exact": spiffe_id}],
        },
    }


def cluster(name: str, tls: Spec, max_requests: int = MAX_REQUESTS) -> dict[str, Any]:
    """Return the cluster of a service: its endpoints by EDS, in turn, without those that keep failing.

    Args:
        name: the service.
        tls: which certificates are shown, and which must be.
        max_requests: at a time, of one caller; the next is refused at once.
    """
    return {
        "name": name,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": ADS, "service_name": name},
        "lb_policy": "ROUND_ROBIN",
        "connect_timeout": CONNECT_TIMEOUT,
        "outlier_detection": _OUTLIERS,
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": max_requests,
                    "max_pending_requests": max_requests,
                    "max_requests": max_requests,
                    # gRPC's clients have no budget; they try again at most three times (_routes).
                    "retry_budget": {"budget_percent": {"value": 20}, "min_retry_concurrency": 10},
                }
            ]
        },
        "transport_socket": {
            "name": "tls",
            "typed_config": {
                "@type": f"{ENVOY}.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context": tls,
            },
        },
    }


def endpoints(name: str, instances: Sequence[Instance], zone: str = "") -> Spec:
    """Return a service's endpoints, by zone; each zone weighs as many as it has, so that each instance weighs one.

    Args:
        name: the service.
        instances: those that pass.
        zone: the caller's; where it has instances, others are for when those fail.
    """

    def place(instance: Instance) -> str:
        return instance.zone

    at_home = bool(zone) and any(instance.zone == zone for instance in instances)

    return {
        "cluster_name": name,
        "endpoints": [
            {
                "locality": {"region": "atelier", "zone": found},
                "priority": int(at_home and found != zone),
                "load_balancing_weight": len(members),
                "lb_endpoints": [_endpoint(member) for member in members],
            }
            for found, members in (
                (found, sorted(members)) for found, members in groupby(sorted(instances, key=place), key=place)
            )
        ],
    }


def _endpoint(instance: Instance) -> Spec:
    address = {"address": instance.host, "port_value": instance.port}
    return {"health_status": "HEALTHY", "endpoint": {"address": {"socket_address": address}}}
