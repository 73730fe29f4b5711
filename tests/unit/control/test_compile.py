"""What each policy becomes in Envoy, and what gRPC's clients are told."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from envoy.config.core.v3 import extension_pb2
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2
from google.protobuf import json_format, symbol_database
from pydantic import ValidationError

from mesh.contract import IMAGE, Contract, HttpRule, Method, installed
from mesh.control import edge, known
from mesh.control.catalog import Instance
from mesh.control.edge import Rate, Settings
from mesh.control.faults import Fault
from mesh.control.known import Known
from mesh.control.revoked import BLOCK, FILTERS, revoked_filters
from mesh.control.routes import ADDRESS_CLASS, JWT, RATES, path_pattern, route_configuration
from mesh.control.snapshot import (
    CLUSTER,
    ENDPOINTS,
    EXTENSION,
    LISTENER,
    ROUTES,
    Resource,
    Snapshot,
    endpoints,
    grpc_clients,
)
from mesh.http import KEEP_ALIVE_SECONDS

GET = Method(
    full_name="/atelier.task.v1.TaskService/GetTask", service="atelier.task.v1.TaskService", owner="task",
    access="USER", callers=frozenset(), deadline_seconds=5.0, rate_class="READ", max_request_bytes=1000,
    audited=False, bytes=False, signed_url=False,
    idempotent=True, client_streaming=False, server_streaming=False,
    http=HttpRule("GET", "/api/v1/tasks/{task_id}", ""), request_type="", response_type="",
)  # fmt: skip
KEYED = Known({}, '{"keys": []}')
SETTINGS = Settings("127.0.0.1", 8080, (), {"READ": Rate(200, 400)}, None, "/secrets")


def contract(*methods: Method) -> Contract:
    return Contract({method.full_name: method for method in methods})


def routes_of(*methods: Method, known: Known = KEYED, origins: tuple[str, ...] = ()) -> list[dict]:
    return route_configuration(contract(*methods), known, origins, None)["virtual_hosts"][0]["routes"]


def routed(method: Method, known: Known = KEYED) -> list[dict]:
    """Return the routes that lead to the method's service."""
    return [
        route
        for route in routes_of(method, known=known)
        if route.get("route", {}).get("cluster") != "none" and "route" in route
    ]


def test_an_rpc_has_a_grpc_and_a_json_route() -> None:
    grpc_route, json_route = routed(GET)

    assert grpc_route["match"]["path"] == GET.full_name
    assert json_route["match"]["safe_regex"]["regex"] == "/api/v1/tasks/[^/:]+"
    assert json_route["match"]["headers"][0]["string_match"]["exact"] == "GET"
    assert grpc_route["route"]["cluster"] == json_route["route"]["cluster"] == "task"


def test_an_rpc_for_services_has_no_route() -> None:
    assert routed(replace(GET, access="SERVICE")) == []


def test_an_rpc_of_bytes_has_a_json_route_to_the_http_listener_only() -> None:
    (route,) = routed(replace(GET, bytes=True))

    assert route["route"]["cluster"] == "task-http"
    assert route["typed_per_filter_config"]["transcoder"]["disabled"] is True
    assert "buffer" not in route["typed_per_filter_config"]


@pytest.mark.parametrize(("access", "filters"), [("PUBLIC", set()), ("USER", {"jwt"}), ("ADMIN", {"jwt", "role"})])
def test_access_becomes_a_token_and_a_role(access: str, filters: set[str]) -> None:
    for route in routed(replace(GET, access=access)):
        assert set(route["typed_per_filter_config"]) - {"buffer"} == filters


@pytest.mark.parametrize(("access", "key"), [("PUBLIC", "address_class"), ("USER", "user_class")])
def test_the_rate_class_counts_users_or_addresses(access: str, key: str) -> None:
    for route in routed(replace(GET, access=access)):
        assert route["metadata"]["filter_metadata"]["atelier.rates"] == {key: "READ"}


def test_the_edge_waits_a_little_longer_than_the_deadline_for_the_service_to_say_so() -> None:
    assert [route["route"]["timeout"] for route in routed(GET)] == ["6s", "6s"]


def test_bytes_may_take_their_time_but_must_not_stand_still() -> None:
    for route in routed(replace(GET, bytes=True, deadline_seconds=600)):
        assert (route["route"]["timeout"], route["route"]["idle_timeout"]) == ("0s", "60s")


def test_a_stream_has_no_timeout_but_must_not_fall_silent() -> None:
    for route in routed(replace(GET, server_streaming=True, deadline_seconds=3600)):
        assert (route["route"]["timeout"], route["route"]["idle_timeout"]) == ("0s", "3600s")


@pytest.mark.parametrize("idempotent", [True, False])
def test_only_what_is_harmless_to_repeat_is_sent_again_after_it_was_sent(idempotent: bool) -> None:
    for route in routed(replace(GET, idempotent=idempotent)):
        assert ("unavailable" in route["route"]["retry_policy"]["retry_on"]) is idempotent
        assert ("reset" in route["route"]["retry_policy"]["retry_on"]) is idempotent


def test_the_body_is_bounded_by_the_policy() -> None:
    for route in routed(GET):
        assert route["typed_per_filter_config"]["buffer"]["buffer"] == {"max_request_bytes": 1000}


def test_without_keys_only_public_calls_are_let_through() -> None:
    unkeyed = Known({}, None)

    assert routed(GET, unkeyed) == []
    assert [route.get("name") for route in routes_of(GET, known=unkeyed)].count("SERVICE_UNAVAILABLE") == 2
    assert len(routed(replace(GET, access="PUBLIC"), unkeyed)) == 2


def test_other_verbs_of_a_path_are_refused_with_those_that_are_allowed() -> None:
    update = replace(
        GET, full_name="/atelier.task.v1.TaskService/Update", http=HttpRule("PATCH", "/api/v1/tasks/{task.id}", "task")
    )

    refused = [route for route in routes_of(GET, update) if route.get("name") == "METHOD_NOT_ALLOWED"]

    assert refused[-1]["match"] == {"safe_regex": {"regex": "/api/v1/tasks/[^/:]+"}}
    assert {"key": "allow", "value": "GET, PATCH"} in [
        added["header"] for added in refused[-1]["response_headers_to_add"]
    ]


def test_a_path_without_variables_is_tried_first() -> None:
    login = replace(GET, full_name="/a/Login", http=HttpRule("POST", "/api/v1/tasks/login", "*"))

    matches = [route["match"] for route in routes_of(GET, login)]
    literal = next(n for n, match in enumerate(matches) if match.get("path") == "/api/v1/tasks/login")
    variable = next(n for n, match in enumerate(matches) if "safe_regex" in match)

    assert literal < variable


@pytest.mark.parametrize(
    ("template", "path", "matches"),
    [
        ("/api/v1/tasks/{task_id}", "/api/v1/tasks/tsk_1", True),
        ("/api/v1/tasks/{task_id}", "/api/v1/tasks/tsk_1:watch", False),
        ("/api/v1/tasks/{task_id}", "/api/v1/tasks/tsk_1/events", False),
        ("/api/v1/tasks/{task_id}", "/api/v1/tasks/", False),
        ("/api/v1/tasks/{task_id}:watch", "/api/v1/tasks/tsk_1:watch", True),
        ("/api/v1/users/{user.user_id}/quota", "/api/v1/users/usr_1/quota", True),
        ("/api/v1/files.json", "/api/v1/filesxjson", False),
    ],
)  # fmt: skip
def test_a_variable_is_one_segment_without_a_colon(template: str, path: str, matches: bool) -> None:
    assert bool(re.fullmatch(path_pattern(template), path)) is matches


def test_pages_of_named_origins_may_call_and_others_not() -> None:
    host = route_configuration(contract(GET), KEYED, ("https://shop.example",), None)["virtual_hosts"][0]

    assert host["typed_per_filter_config"]["cors"]["allow_origin_string_match"] == [{"exact": "https://shop.example"}]


def test_health_changes_endpoints_and_readiness_and_nothing_else() -> None:
    image = IMAGE.read_bytes()
    before = edge.envoy(installed(), image, KEYED, SETTINGS, str)
    after = edge.envoy(installed(), image, Known({"task": (Instance("127.0.0.1", 1),)}, KEYED.jwks), SETTINGS, str)

    changed = {
        (type_url.rpartition(".")[2], name)
        for type_url, named in after.resources.items()
        for name, resource in named.items()
        if before.of(type_url)[name].version != resource.version
    }

    assert changed == {("ClusterLoadAssignment", "task"), ("RouteConfiguration", "edge")}


def test_keys_and_limits_never_change_the_listener() -> None:
    image = IMAGE.read_bytes()
    before = edge.envoy(installed(), image, Known({}, None), SETTINGS, str)
    after = edge.envoy(
        installed(), image, KEYED, replace(SETTINGS, rates={"READ": Rate(1, 1)}, cors_origins=("a",)), str
    )

    assert before.of(LISTENER)["edge"].version == after.of(LISTENER)["edge"].version
    assert before.of(EXTENSION)["jwt"].version != after.of(EXTENSION)["jwt"].version
    assert before.of(EXTENSION)["ratelimit"].version != after.of(EXTENSION)["ratelimit"].version


def test_a_revocation_changes_the_newer_filter_and_nothing_else() -> None:
    revoked = {("sid", f"ses_{number}"): float(number) for number in range(2 * BLOCK)}
    present = [replace(KEYED, revoked=each) for each in (revoked, {**revoked, ("gen", "usr_1/1"): 1e9})]

    before, after = (edge.envoy(contract(GET), IMAGE.read_bytes(), each, SETTINGS, str) for each in present)

    changed = {
        (type_url, name)
        for type_url, named in after.resources.items()
        for name, resource in named.items()
        if resource.version != before.of(type_url)[name].version
    }
    assert changed == {(EXTENSION, "revoked_lately")}


@pytest.mark.parametrize("number", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK])
def test_every_revocation_is_in_one_of_two_filters_and_stays_while_it_moves(number: int) -> None:
    revoked = {("sid", f"ses_{each}"): float(each) for each in range(number)}
    after = {**revoked, ("sid", "ses_new"): 1e9}

    older, newer = (values(revoked_filters(revoked)[name]) for name in FILTERS)
    older_then, newer_then = (values(revoked_filters(after)[name]) for name in FILTERS)

    everything = {value for _, value in revoked}
    assert older | newer == everything
    assert everything <= older_then | newer  # the one update may come before the other
    assert everything <= older | newer_then
    assert older_then | newer_then == {*everything, "ses_new"}
    assert len(newer) < 2 * BLOCK


def values(resource: Resource) -> set[str]:
    """Return the sessions that a filter refuses."""
    extension, config = extension_pb2.TypedExtensionConfig(), rbac_pb2.RBAC()
    assert resource.packed.Unpack(extension)
    assert extension.typed_config.Unpack(config)
    return set(config.matcher.on_no_match.matcher.matcher_tree.exact_match_map.map)


def test_the_same_is_revoked_in_the_same_version_by_every_control_plane() -> None:
    revoked = {("sid", "ses_1"): 1.0, ("gen", "usr_1/1"): 1.0, ("jti", "jti_1"): 2.0}

    assert {name: made.version for name, made in revoked_filters(revoked).items()} == {
        name: made.version for name, made in revoked_filters(dict(reversed(revoked.items()))).items()
    }


def test_what_is_known_is_read_as_it_was_kept(tmp_path) -> None:
    present = Known({"task": (Instance("127.0.0.1", 1),)}, '{"keys": []}', revoked={("sid", "ses_1"): 1.5})

    known.save(tmp_path / "known.json", present)

    assert known.load(tmp_path / "known.json") == present


def test_a_service_without_instances_is_there_and_empty() -> None:
    told = grpc_clients({}, contract(GET), str)

    for type_url in (LISTENER, ROUTES, CLUSTER, ENDPOINTS):
        assert "task" in told.of(type_url)


def test_a_service_that_no_contract_names_can_be_called_by_its_name_in_the_registry() -> None:
    assert "notification" in grpc_clients({"notification": ()}, contract(GET), str).of(LISTENER)


def test_grpc_clients_are_told_whose_certificate_to_expect_in_the_field_that_grpc_reads() -> None:
    tls = message(grpc_clients({}, contract(GET), "spiffe://mesh/{}".format), CLUSTER, "task")["transport_socket"]

    context = tls["typed_config"]["common_tls_context"]["validation_context"]
    assert context["match_subject_alt_names"] == [{"exact": "spiffe://mesh/task"}]


@pytest.mark.parametrize("idempotent", [True, False])
def test_grpc_clients_retry_idempotent_calls_only_and_are_given_no_timeouts(idempotent: bool) -> None:
    message = grpc_clients({}, contract(replace(GET, idempotent=idempotent)), str).of(ROUTES)["task"].packed

    text = message.value
    assert (b"unavailable" in text) is idempotent
    assert (GET.full_name.encode() in text) is idempotent


def test_each_instance_weighs_the_same_whatever_its_zone() -> None:
    instances = [Instance("h", 1, zone="b"), Instance("h", 2, zone="a"), Instance("h", 3, zone="b")]

    zones = endpoints("task", instances)["endpoints"]

    assert [(zone["locality"]["zone"], zone["load_balancing_weight"]) for zone in zones] == [("a", 1), ("b", 2)]


@pytest.mark.parametrize("text", ["", "1", "0:1", "1:0", "a:b", "1:2:3"])
def test_a_rate_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="rate"):
        Rate.parsed(text)


def message(told: Snapshot, type_url: str, name: str) -> dict:
    packed = told.of(type_url)[name].packed
    found = symbol_database.Default().GetSymbol(packed.type_url.partition("/")[2])()
    packed.Unpack(found)
    return json_format.MessageToDict(found, preserving_proto_field_name=True)


def test_clients_and_edge_eject_what_fails_and_never_more_than_half() -> None:
    clients = message(grpc_clients({}, contract(GET), str), CLUSTER, "task")
    envoy = message(edge.envoy(installed(), IMAGE.read_bytes(), KEYED, SETTINGS, str), CLUSTER, "task")

    for told in (clients, envoy):
        assert told["outlier_detection"]["max_ejection_percent"] == 50
        assert told["outlier_detection"]["consecutive_gateway_failure"] == 5
        assert told["outlier_detection"]["enforcing_failure_percentage"] == 100


def test_the_edge_gives_up_an_idle_http_connection_before_the_service_does() -> None:
    told = message(edge.envoy(installed(), IMAGE.read_bytes(), KEYED, SETTINGS, str), CLUSTER, "storage-http")

    (options,) = told["typed_extension_protocol_options"].values()
    idle = float(options["common_http_protocol_options"]["idle_timeout"].removesuffix("s"))
    assert 0 < idle < KEEP_ALIVE_SECONDS


def test_requests_at_a_time_are_bounded_by_the_settings_and_retries_by_a_budget() -> None:
    settings = replace(SETTINGS, max_requests=7)
    clients = message(grpc_clients({}, contract(GET), str, max_requests=7), CLUSTER, "task")
    envoy = message(edge.envoy(installed(), IMAGE.read_bytes(), KEYED, settings, str), CLUSTER, "task")

    for told in (clients, envoy):
        (threshold,) = told["circuit_breakers"]["thresholds"]
        assert threshold["max_requests"] == 7
        assert threshold["retry_budget"]["budget_percent"]["value"] == 20


def test_a_clients_own_zone_comes_first_and_the_others_when_it_fails() -> None:
    instances = [Instance("h", 1, zone="b"), Instance("h", 2, zone="a"), Instance("h", 3, zone="b")]

    def priorities(zone: str) -> list[tuple[str, int]]:
        return [
            (each["locality"]["zone"], each["priority"]) for each in endpoints("task", instances, zone)["endpoints"]
        ]

    assert priorities("a") == [("a", 0), ("b", 1)]
    assert priorities("b") == [("a", 1), ("b", 0)]
    assert priorities("c") == priorities("") == [("a", 0), ("b", 0)]


def test_endpoints_depend_on_the_zone_of_who_asks() -> None:
    told = grpc_clients({"task": (Instance("h", 1, zone="a"), Instance("h", 2, zone="b"))}, contract(GET), str)

    versions = {zone: told.of(ENDPOINTS, zone)["task"].version for zone in ("", "a", "b", "elsewhere")}

    assert versions[""] == versions["elsewhere"]
    assert len(set(versions.values())) == 3


def test_a_fault_is_told_to_clients_and_to_the_edge_by_routes_alone() -> None:
    ailing = {"task": Fault(delay_seconds=0.5, delay_fraction=0.25, abort_code="UNAVAILABLE", abort_fraction=1)}
    well, ill = (grpc_clients({}, contract(GET), str, faults) for faults in ({}, ailing))
    at_edge = [
        edge.envoy(installed(), IMAGE.read_bytes(), replace(KEYED, faults=faults), SETTINGS, str)
        for faults in ({}, ailing)
    ]

    (host,) = message(ill, ROUTES, "task")["virtual_hosts"]
    fault = host["typed_per_filter_config"]["fault"]
    assert fault["delay"]["fixed_delay"] == "0.500s"
    assert fault["delay"]["percentage"]["numerator"] == 250_000
    assert fault["abort"]["grpc_status"] == 14
    (own, _) = routed(GET, replace(KEYED, faults=ailing))
    assert own["typed_per_filter_config"]["fault"]["abort"]["http_status"] == 503
    for before, after in ((well, ill), at_edge):
        changed = {
            type_url
            for type_url, named in after.resources.items()
            for name, resource in named.items()
            if before.of(type_url)[name].version != resource.version
        }
        assert changed == {ROUTES}


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"delay_seconds": 1},
        {"delay_fraction": 1},
        {"abort_code": "UNAVAILABLE"},
        {"abort_fraction": 0.5},
        {"abort_code": "NOT_FOUND", "abort_fraction": 1},
        {"delay_seconds": 61, "delay_fraction": 1},
        {"delay_seconds": 1, "delay_fraction": 1.1},
        {"abort_code": "UNAVAILABLE", "abort_fraction": 1, "percent": 3},
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(said: dict) -> None:
    with pytest.raises(ValidationError):
        Fault.model_validate(said)


def test_a_signed_url_finds_a_route_without_a_token_before_the_one_with_it() -> None:
    method = replace(GET, bytes=True, signed_url=True)

    signed, usual = [each for each in routed(method) if "safe_regex" in each["match"]]

    assert signed["match"]["query_parameters"] == [{"name": "signature", "present_match": True}]
    assert (JWT in signed["typed_per_filter_config"], JWT in usual["typed_per_filter_config"]) == (False, True)
    assert "query_parameters" not in usual["match"]
    assert ADDRESS_CLASS in signed["metadata"]["filter_metadata"][RATES]
