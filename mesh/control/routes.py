"""Compiles the contract's policies into the edge's routes. Pure."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mesh import VERSION
from mesh.contract import Contract, HttpRule, Method
from mesh.control import faults
from mesh.control.faults import Fault
from mesh.control.known import Known
from mesh.control.replies import (
    METHOD_NOT_ALLOWED,
    RETRY_AFTER_SECONDS,
    ROUTE_NOT_FOUND,
    SERVICE_UNAVAILABLE,
    Refusal,
)
from mesh.control.revoked import HEADERS
from mesh.control.snapshot import ENVOY, Spec
from mesh.urls import PARAMETER

# Names of the edge's filters, which routes refer to.
CORS = "cors"
JWT = "jwt"
ROLE = "role"
BUFFER = "buffer"
TRANSCODER = "transcoder"

BEARER = "bearer"
"""The requirement of a valid token."""
CLAIMS = "claims"
"""Where the token filter puts a token's claims."""
JWT_METADATA = "envoy.filters.http.jwt_authn"

GRACE_SECONDS = 1.0  # beyond a call's deadline: the way here and back, and a busy machine
BYTES_IDLE_SECONDS = 60  # without one byte either way, the check and sync of an upload included

RATES = "atelier.rates"
"""Where a route says its rate class: under one of these two keys."""
USER_CLASS = "user_class"
ADDRESS_CLASS = "address_class"

_HTTP_FILTERS = f"{ENVOY}.extensions.filters.http"
_EXPOSED = (
    "x-request-id, retry-after, etag, content-range, content-disposition, location, www-authenticate, "
    "grpc-status, grpc-message, grpc-status-details-bin"
)
# What the edge answers by itself holds nothing private; its filter for other origins overlooks these answers.
_READABLE = {"access-control-allow-origin": "*", "access-control-expose-headers": _EXPOSED}
_MAX_DIRECT_RESPONSE_BYTES = 8 * 1024 * 1024  # the OpenAPI document is the largest


def cluster_of(method: Method) -> str:
    """Return the name in the registry of the listener that serves an rpc at the edge."""
    return f"{method.owner}-http" if method.bytes else method.owner


def open_methods(contract: Contract) -> list[Method]:
    """Return the rpcs that the edge has routes to, in order."""
    return sorted(
        (method for method in contract.methods.values() if method.access != "SERVICE"),
        key=lambda method: method.full_name,
    )


def route_configuration(
    contract: Contract, known: Known, cors_origins: tuple[str, ...], openapi: str | None
) -> dict[str, Any]:
    """Return every route of the edge.

    Args:
        contract: whose rpcs it opens.
        known: the registry, for readiness, and the keys, without which calls that need a token are refused.
        cors_origins: origins whose pages may call; those of this machine when empty.
        openapi: the OpenAPI document.
    """
    methods = open_methods(contract)
    return {
        "name": "edge",
        "max_direct_response_body_size_bytes": _MAX_DIRECT_RESPONSE_BYTES,
        "request_headers_to_remove": sorted(HEADERS.values()),
        "virtual_hosts": [
            {
                "name": "edge",
                "domains": ["*"],
                "typed_per_filter_config": {CORS: _cors(cors_origins)},
                "routes": [
                    _preflights(),
                    *_own_routes(contract, known, openapi),
                    *(_grpc_route(method, known) for method in methods if not method.bytes),
                    *_json_routes(methods, known),
                    _refused({"prefix": "/"}, ROUTE_NOT_FOUND),
                ],
            }
        ],
    }


def _preflights() -> Spec:
    """Return the route for a browser's question whether a page may call; the filter for that answers it itself.

    It overlooks routes that answer directly, as those of unknown paths and verbs do.
    """
    asked = {"name": "access-control-request-method", "present_match": True}
    return {"match": {"prefix": "/", "headers": [_verb("OPTIONS"), asked]}, "route": {"cluster": "none"}}


def _own_routes(contract: Contract, known: Known, openapi: str | None) -> list[Spec]:
    """Return what the edge answers by itself, without a token."""
    clusters = {method.owner for method in contract.methods.values()}
    clusters |= {cluster_of(method) for method in contract.methods.values()}
    clusters.discard("control")  # one is there, for it says this; what people do needs none
    missing = sorted(name for name in clusters if not known.catalog.get(name))
    if missing or known.jwks is None:
        waiting = missing or ["keys"]
        refusal = Refusal("NOT_READY", 503, 14, f"Not ready: waiting for {', '.join(waiting)}.")
        ready = _answered("/readyz", refusal.json(missing=",".join(waiting)), status=503, retry_after=True)
    else:
        ready = _answered("/readyz", {"status": "ready"})
    welcome = {
        "name": "atelier",
        "version": VERSION,
        "description": "The backend under AI design products: accounts, files and durable media tasks.",
        "start": "POST /api/v1/users/register, then POST /api/v1/users/login",
        "openapi": "/openapi.json",
        "ready": "/readyz",
    }
    routes = [
        _answered("/", welcome),
        _answered("/healthz", {"status": "alive"}),
        ready,
        _answered("/api/v1/version", {"version": VERSION}),
        _answered("/.well-known/jwks.json", json.loads(known.jwks or '{"keys": []}')),
    ]
    if openapi is not None:
        routes.append(_answered("/openapi.json", json.loads(openapi)))
    paths = [route["match"]["path"] for route in routes]
    return [*routes, *(_not_allowed({"path": path}, ["GET", "HEAD"]) for path in paths)]


def _answered(path: str, body: Mapping[str, Any], status: int = 200, retry_after: bool = False) -> Spec:
    headers = {"content-type": "application/json", "cache-control": "no-cache"}
    if retry_after:
        headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    return {
        "match": {"path": path, "headers": [_verb("GET", "HEAD")]},
        "direct_response": {"status": status, "body": {"inline_string": json.dumps(body, ensure_ascii=False)}},
        "response_headers_to_add": _added({**headers, **_READABLE}),
    }


def _refused(match: Spec, refusal: Refusal, **headers: str) -> Spec:
    """Return a route that refuses; `replies` recognises it by its name and writes the answer."""
    return {
        "name": refusal.reason,
        "match": match,
        "direct_response": {"status": refusal.http_status},
        "response_headers_to_add": _added({**headers, **_READABLE}),
    }


def _not_allowed(match: Spec, verbs: list[str]) -> Spec:
    return _refused(match, METHOD_NOT_ALLOWED, allow=", ".join(sorted(verbs)))


def _added(headers: Mapping[str, str]) -> list[Spec]:
    return [
        {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
        for key, value in headers.items()
    ]


def _grpc_route(method: Method, known: Known) -> Spec:
    content_type = {"name": "content-type", "string_match": {"prefix": "application/grpc"}}
    return _route({"path": method.full_name, "headers": [content_type]}, method, known)


def _json_routes(methods: list[Method], known: Known) -> list[Spec]:
    """Return a route for each JSON path and verb, and after a path's last verb a refusal of all others.

    Paths without variables come first: `users/login` is no user's id.
    """
    by_path: dict[str, list[tuple[HttpRule, Method]]] = defaultdict(list)
    for method in methods:
        if method.http is not None:
            by_path[path_pattern(method.http.path)].append((method.http, method))
    routes: list[Spec] = []
    for pattern, served in sorted(by_path.items(), key=lambda item: ("[" in item[0], item[0])):
        path = {"safe_regex": {"regex": pattern}} if "[" in pattern else {"path": served[0][0].path}
        allowed = []
        for rule, method in served:
            # The listener for bytes answers HEAD, which the transcoder cannot.
            verbs = ["GET", "HEAD"] if method.bytes and rule.verb == "GET" else [rule.verb]
            match = {**path, "headers": [_verb(*verbs)]}
            if method.signed_url:  # the service verifies it; where nobody is known the rate is an address's
                signed = {**match, "query_parameters": [{"name": PARAMETER, "present_match": True}]}
                routes.append(_json_route(signed, replace(method, access="PUBLIC"), known))
            routes.append(_json_route(match, method, known))
            allowed += verbs
        routes.append(_not_allowed(path, allowed))
    return routes


def _json_route(match: Spec, method: Method, known: Known) -> Spec:
    # A header of gRPC's: what a browser or a proxy puts there is no deadline.
    return {**_route(match, method, known), "request_headers_to_remove": ["grpc-timeout"]}


def path_pattern(template: str) -> str:
    """Return the regular expression of a google.api.http path. A variable is one segment and holds no colon."""
    parts = re.split(r"\{[^}]*\}", template)
    return "[^/:]+".join(re.escape(part) for part in parts)


def _verb(*verbs: str) -> Spec:
    match: Spec = {"exact": verbs[0]} if len(verbs) == 1 else {"safe_regex": {"regex": "|".join(verbs)}}
    return {"name": ":method", "string_match": match}


def _route(match: Spec, method: Method, known: Known) -> Spec:
    if method.access != "PUBLIC" and known.jwks is None:
        return _refused(match, SERVICE_UNAVAILABLE)
    # A request that never reached its service may always be sent again; one that did, only where that is harmless.
    retry_on = "connect-failure,refused-stream" + (",reset,unavailable" if method.idempotent else "")
    return {
        "match": match,
        "route": {
            "cluster": cluster_of(method),
            **_time_limits(method),
            "retry_policy": {
                "retry_on": retry_on,
                "num_retries": 2,
                "retry_host_predicate": [
                    {
                        "name": "previous_hosts",
                        "typed_config": {
                            "@type": f"{ENVOY}.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                        },
                    }
                ],
                "host_selection_retry_max_attempts": 3,
            },
        },
        # Whose bucket of the class a call draws from: its user's, or its address's where no token is asked for.
        "metadata": {
            "filter_metadata": {RATES: {ADDRESS_CLASS if method.access == "PUBLIC" else USER_CLASS: method.rate_class}}
        },
        "typed_per_filter_config": _filters(method, known.faults.get(method.owner)),
    }


def _time_limits(method: Method) -> Spec:
    """Return for how long a call may take, or fall silent, before the edge ends it."""
    if method.bytes:
        # How long a body takes is up to who sends or reads it; one that stands still is ended.
        return {"timeout": "0s", "idle_timeout": f"{BYTES_IDLE_SECONDS}s"}
    if method.server_streaming:
        # It may last; it ends when nothing has come for as long as a whole call may take.
        return {"timeout": "0s", "idle_timeout": f"{method.deadline_seconds:g}s"}
    # The service, which knows the same deadline, ends it first and says why: only one that hangs is met here.
    return {"timeout": f"{method.deadline_seconds + GRACE_SECONDS:g}s"}


def _filters(method: Method, ailing: Fault | None) -> dict[str, Spec]:
    """Return what the filters do otherwise on this route."""
    filters: dict[str, Spec] = {}
    if method.access != "PUBLIC":
        filters[JWT] = {"@type": f"{_HTTP_FILTERS}.jwt_authn.v3.PerRouteConfig", "requirement_name": BEARER}
    if ailing:
        filters[faults.FAULT] = ailing.filter(http=True)
    if method.access == "ADMIN":
        filters[ROLE] = _administrators()
    if method.bytes:
        # The service's HTTP listener reads and bounds the body itself.
        filters[TRANSCODER] = {"@type": f"{ENVOY}.config.route.v3.FilterConfig", "disabled": True}
    else:
        filters[BUFFER] = {
            "@type": f"{_HTTP_FILTERS}.buffer.v3.BufferPerRoute",
            "buffer": {"max_request_bytes": method.max_request_bytes},
        }
    return filters


def _administrators() -> Spec:
    path = [{"key": CLAIMS}, {"key": "role"}]
    role = {"filter": JWT_METADATA, "path": path, "value": {"string_match": {"exact": "ROLE_ADMIN"}}}
    policy = {"permissions": [{"any": True}], "principals": [{"sourced_metadata": {"metadata_matcher": role}}]}
    return {
        "@type": f"{_HTTP_FILTERS}.rbac.v3.RBACPerRoute",
        "rbac": {"rules": {"action": "ALLOW", "policies": {"administrators": policy}}},
    }


def _cors(origins: tuple[str, ...]) -> Spec:
    here = {"safe_regex": {"regex": r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"}}
    return {
        "@type": f"{_HTTP_FILTERS}.cors.v3.CorsPolicy",
        "allow_origin_string_match": [{"exact": origin} for origin in origins] or [here],
        "allow_methods": "GET, POST, PUT, PATCH, DELETE",
        "allow_headers": (
            "authorization, content-type, idempotency-key, last-event-id, range, if-match, if-none-match, "
            "traceparent, x-grpc-web, x-user-agent, grpc-timeout"
        ),
        "expose_headers": _EXPOSED,
        "forward_not_matching_preflights": False,
        "max_age": "600",
    }
