"""Compiles the contract, the registry and the keys into what Envoy is told. Pure.

What changes at run time travels by RDS, EDS or ECDS: a new listener would end every open stream.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2, status_pb2

from mesh.contract import Contract
from mesh.control import faults, routes
from mesh.control.known import Known
from mesh.control.replies import local_replies
from mesh.control.revoked import FILTERS, HEADERS, revoked_filters
from mesh.control.routes import BEARER, BUFFER, CLAIMS, CORS, JWT, ROLE, TRANSCODER
from mesh.control.snapshot import (
    ADS,
    CLUSTER,
    ENVOY,
    EXTENSION,
    LISTENER,
    MAX_REQUESTS,
    ROUTES,
    Snapshot,
    Spec,
    SpiffeId,
    cluster,
    snapshot,
    with_endpoints,
)
from mesh.identity import AUDIENCE, ISSUER, LEEWAY_SECONDS

RATELIMIT = "ratelimit"
MAX_BUCKETS = 20_000  # users and addresses seen lately; about 5 MB
IDLE_TIMEOUT = "30s"  # of a connection to a service's HTTP listener; less than that keeps it (mesh.http)
# What nobody reads is to wait at the service, not here: its stream stands still then, and the service ends it.
STREAM_WINDOW_BYTES = 64 * 1024
CONNECTION_WINDOW_BYTES = 256 * 1024 * 1024  # 4,000 streams that stand still leave the others of a connection theirs
MAX_RESPONSE_BYTES = 4 * 1024 * 1024  # gRPC's own limit for a message

_HTTP_FILTERS = f"{ENVOY}.extensions.filters.http"


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket."""

    per_second: int
    burst: int

    @classmethod
    def parsed(cls, text: str) -> Rate:
        """Read `per second:burst`, e.g. `200:400`.

        Raises:
            ValueError: it is not two numbers > 0.
        """
        try:
            per_second, burst = (int(part) for part in text.split(":"))
        except ValueError:
            raise ValueError(f"a rate is `per second:burst`, e.g. 200:400; this is {text!r}") from None
        if per_second < 1 or burst < 1:
            raise ValueError(f"a rate's numbers are > 0; this is {text!r}")
        return cls(per_second, burst)


@dataclass(frozen=True, slots=True)
class Settings:
    """What an installation may choose of its edge."""

    host: str
    port: int
    cors_origins: tuple[str, ...]
    """Whose pages may call; those of this machine when empty."""
    rates: Mapping[str, Rate]
    """Rate class to what one user, or one address without a token, may do."""
    openapi: str | None
    """The OpenAPI document, where there is one."""
    secrets: str
    """The folder, as Envoy sees it, whose leaf.json and roots.json tell where its certificates are."""
    max_requests: int = MAX_REQUESTS
    """To one service at a time; the next is refused."""


def envoy(contract: Contract, image: bytes, known: Known, settings: Settings, spiffe_id: SpiffeId) -> Snapshot:
    """Compile all that Envoy is told.

    Args:
        contract: read from `image`.
        image: the contracts' descriptors, for the transcoder.
        known: what the registry and the identity feed say.
        settings: the installation's choices.
        spiffe_id: returns how a service is called in its certificate.
    """
    clusters = sorted({routes.cluster_of(method) for method in routes.open_methods(contract)})
    filters = {
        JWT: _tokens(known.jwks),
        RATELIMIT: _rates(settings.rates),
        TRANSCODER: _json_interface(contract, image),
    }
    told = snapshot(
        {
            CLUSTER: {name: _cluster(name, settings, spiffe_id(name.removesuffix("-http"))) for name in clusters},
            LISTENER: {"edge": _listener(settings)},
            EXTENSION: {
                **revoked_filters(known.revoked),
                **{name: {"name": name, "typed_config": config} for name, config in filters.items()},
            },
            ROUTES: {
                "edge": routes.route_configuration(contract, known, settings.cors_origins, settings.openapi),
            },
        }
    )
    return with_endpoints(told, {name: name for name in clusters}, known.catalog)


def _cluster(name: str, settings: Settings, spiffe_id: str) -> Spec:
    # It is the edge that closes an idle connection, never the service: that may meet the next request under way.
    http: Spec = {
        "common_http_protocol_options": {"idle_timeout": IDLE_TIMEOUT},
        "explicit_http_config": {"http_protocol_options": {}},
    }
    named = {"san_type": "URI", "matcher": {"exact": spiffe_id}}
    tls: dict[str, Any] = {
        "tls_certificate_sds_secret_configs": [_secret("leaf", settings.secrets)],
        "combined_validation_context": {
            "default_validation_context": {"match_typed_subject_alt_names": [named]},
            "validation_context_sds_secret_config": _secret("roots", settings.secrets),
        },
    }
    if not name.endswith("-http"):
        # A service that hangs without closing its connections is noticed; servers permit this (mesh.service).
        options: Spec = {
            "connection_keepalive": {"interval": "30s", "timeout": "5s"},
            "initial_stream_window_size": STREAM_WINDOW_BYTES,
            "initial_connection_window_size": CONNECTION_WINDOW_BYTES,
        }
        http = {"explicit_http_config": {"http2_protocol_options": options}}
        tls["alpn_protocols"] = ["h2"]  # gRPC's servers insist
    return {
        **cluster(name, tls, settings.max_requests),
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{ENVOY}.extensions.upstreams.http.v3.HttpProtocolOptions",
                **http,
            }
        },
    }


def _secret(name: str, folder: str) -> Spec:
    return {
        "name": name,
        "sds_config": {"path_config_source": {"path": f"{folder}/{name}.json"}, "resource_api_version": "V3"},
    }


def _listener(settings: Settings) -> Spec:
    manager = {
        "@type": f"{ENVOY}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "edge",
        "codec_type": "AUTO",
        "server_name": "atelier",
        "rds": {"config_source": ADS, "route_config_name": "edge"},
        "use_remote_address": True,
        "internal_address_config": {},  # nobody is trusted for where he comes from
        "always_set_request_id_in_response": True,
        "normalize_path": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "request_headers_timeout": "10s",
        "early_header_mutation_extensions": [_outside_headers_removed()],
        "http_filters": [
            _filter(CORS, "cors.v3.Cors"),
            _compression(),
            _filter("grpc_web", "grpc_web.v3.GrpcWeb"),
            _discovered(JWT, "jwt_authn.v3.JwtAuthentication"),
            *(_discovered(name, "rbac.v3.RBAC") for name in FILTERS),
            _filter(ROLE, "rbac.v3.RBAC"),
            _discovered(RATELIMIT, "local_ratelimit.v3.LocalRateLimit"),
            # Off but where a route says how much; the rest has no use for a body, or bounds it itself.
            {**_filter(BUFFER, "buffer.v3.Buffer", max_request_bytes=1), "disabled": True},
            _discovered(TRANSCODER, "grpc_json_transcoder.v3.GrpcJsonTranscoder"),
            {"name": faults.FAULT, "typed_config": faults.NONE},  # routes say what ails
            _filter("router", "router.v3.Router", suppress_envoy_headers=True),
        ],
        "local_reply_config": local_replies(),
        "access_log": [_failures_logged()],
    }
    return {
        "name": "edge",
        "address": {"socket_address": {"address": settings.host, "port_value": settings.port}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }


def _filter(name: str, message: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "typed_config": {"@type": f"{_HTTP_FILTERS}.{message}", **fields}}


def _discovered(name: str, message: str) -> Spec:
    return {"name": name, "config_discovery": {"config_source": ADS, "type_urls": [f"{_HTTP_FILTERS}.{message}"]}}


def _outside_headers_removed() -> Spec:
    """Return what takes away every header by which parts of the mesh tell each other things."""
    return {
        "name": "outside",
        "typed_config": {
            "@type": f"{ENVOY}.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
            "mutations": [
                {"remove_on_match": {"key_matcher": {"prefix": "x-atelier-"}}},
                {"remove_on_match": {"key_matcher": {"prefix": "x-envoy-"}}},
                {"remove": "x-request-id"},
            ],
        },
    }


def _compression() -> Spec:
    """Return the filter that compresses JSON; events, which must not wait for a block to fill, are no type of its."""
    return _filter(
        "compressor",
        "compressor.v3.Compressor",
        compressor_library={
            "name": "gzip",
            "typed_config": {"@type": f"{ENVOY}.extensions.compression.gzip.compressor.v3.Gzip"},
        },
        response_direction_config={"common_config": {"min_content_length": 1024}},
    )


def _failures_logged() -> Spec:
    return {
        "name": "stdout",
        "filter": {
            "status_code_filter": {
                "comparison": {"op": "GE", "value": {"default_value": 500, "runtime_key": "edge.logged_status"}}
            }
        },
        "typed_config": {
            "@type": f"{ENVOY}.extensions.access_loggers.stream.v3.StdoutAccessLog",
            "log_format": {
                "json_format": {
                    "time": "%START_TIME%",
                    "service": "edge",
                    "request_id": "%REQ(X-REQUEST-ID)%",
                    "method": "%REQ(X-ENVOY-ORIGINAL-METHOD?:METHOD)%",
                    "path": "%PATH(NQ:ORIG_OR_PATH)%",  # a query may hold what must not be kept
                    "status": "%RESPONSE_CODE%",
                    "details": "%RESPONSE_CODE_DETAILS%",
                    "milliseconds": "%DURATION%",
                    "upstream": "%UPSTREAM_HOST%",
                }
            },
        },
    }


def _tokens(jwks: str | None) -> Spec:
    """Return the filter that checks access tokens. Routes say where it asks for one."""
    config: dict[str, Any] = {"@type": f"{_HTTP_FILTERS}.jwt_authn.v3.JwtAuthentication"}
    if jwks is not None:
        config["providers"] = {
            "atelier": {
                "issuer": ISSUER,
                "audiences": [AUDIENCE],
                "require_expiration": True,
                "clock_skew_seconds": LEEWAY_SECONDS,
                "local_jwks": {"inline_string": jwks},
                # Said, because the default also takes a token from the query, which ends up in logs.
                # A scheme's case means nothing (RFC 9110, 11.1); a prefix's does, so each that is in use is named.
                "from_headers": [
                    {"name": "authorization", "value_prefix": f"{scheme} "} for scheme in ("Bearer", "bearer", "BEARER")
                ],
                "forward": True,
                "payload_in_metadata": CLAIMS,
                # Exact-match maps read headers, not metadata.
                "claim_to_headers": [{"header_name": header, "claim_name": claim} for claim, header in HEADERS.items()],
                "jwt_cache_config": {"jwt_cache_size": 10_000},
            }
        }
        config["requirement_map"] = {BEARER: {"provider_name": "atelier"}}
    return config


def _rates(rates: Mapping[str, Rate]) -> Spec:
    """Return the filter that limits each user, or each address where no token is asked for, by rate class."""
    always = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    return {
        "@type": f"{_HTTP_FILTERS}.local_ratelimit.v3.LocalRateLimit",
        "stat_prefix": "edge",
        "filter_enabled": always,
        "filter_enforced": always,
        "rate_limited_as_resource_exhausted": True,
        "max_dynamic_descriptors": MAX_BUCKETS,
        # For what has no bucket of its own: as good as no limit.
        "token_bucket": {"max_tokens": 1_000_000, "tokens_per_fill": 1_000_000, "fill_interval": "1s"},
        "always_consume_default_token_bucket": False,
        "rate_limits": [
            {"actions": [_said_by_route(routes.USER_CLASS), _said_by_token("sub")]},
            {"actions": [_said_by_route(routes.ADDRESS_CLASS), {"remote_address": {}}]},
        ],
        "descriptors": [
            {
                # An entry without a value stands for each value, with a bucket of its own.
                "entries": [{"key": key, "value": rate_class}, {"key": whose}],
                "token_bucket": {"max_tokens": rate.burst, "tokens_per_fill": rate.per_second, "fill_interval": "1s"},
            }
            for rate_class, rate in sorted(rates.items())
            for key, whose in ((routes.USER_CLASS, "sub"), (routes.ADDRESS_CLASS, "remote_address"))
        ],
    }


def _said_by_route(key: str) -> Spec:
    """Return the action that takes a route's word; a route that says nothing has no such limit."""
    metadata_key = {"key": routes.RATES, "path": [{"key": key}]}
    return {"metadata": {"descriptor_key": key, "source": "ROUTE_ENTRY", "metadata_key": metadata_key}}


def _said_by_token(claim: str) -> Spec:
    metadata_key = {"key": routes.JWT_METADATA, "path": [{"key": CLAIMS}, {"key": claim}]}
    return {"metadata": {"descriptor_key": claim, "source": "DYNAMIC", "metadata_key": metadata_key}}


def _json_interface(contract: Contract, image: bytes) -> Spec:
    """Return the filter that turns JSON into gRPC and back."""
    methods = routes.open_methods(contract)
    return {
        "@type": f"{_HTTP_FILTERS}.grpc_json_transcoder.v3.GrpcJsonTranscoder",
        "proto_descriptor_bin": _with_errors(image),
        "services": sorted({method.service for method in methods}),
        "match_incoming_request_route": True,  # a call's policy stands on the route it came by
        "convert_grpc_status": True,
        "print_options": {"always_print_primitive_fields": True},
        "request_validation_options": {"reject_unknown_query_parameters": True},
        "max_request_body_size": max(method.max_request_bytes for method in methods if not method.bytes),
        "max_response_body_size": MAX_RESPONSE_BYTES,
    }


@cache
def _with_errors(image: bytes) -> str:
    """Return the descriptors and those of the errors' details, which no contract imports but every answer may hold."""
    files = descriptor_pb2.FileDescriptorSet.FromString(image)
    known = {file.name for file in files.file}

    def add(descriptor: Any) -> None:
        for dependency in descriptor.dependencies:
            add(dependency)
        if descriptor.name not in known:
            known.add(descriptor.name)
            descriptor.CopyToProto(files.file.add())

    add(status_pb2.DESCRIPTOR)
    add(error_details_pb2.DESCRIPTOR)
    return base64.b64encode(files.SerializeToString(deterministic=True)).decode()
