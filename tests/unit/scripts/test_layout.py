"""Where the mesh of one machine listens and what its programs are told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scripts.local import configs
from scripts.local.layout import (
    DATABASES,
    SERVICES,
    SPAN,
    WORKERS,
    Layout,
    Process,
    SettingRefused,
    mesh_environment,
    processes,
)
from scripts.local.programs import CannotStart
from scripts.local.up import require_databases


@pytest.fixture
def mesh(tmp_path):
    return Layout(var=tmp_path, replicas=2)


def programs(mesh: Layout, caller: dict[str, str] | None = None) -> dict[str, Process]:
    environment = mesh_environment(mesh, caller or {}, "s3cret")
    return {each.name: each for each in processes(mesh, environment, consul="consul", rabbitmq="rabbitmq-server")}


def test_no_port_is_given_twice_and_all_but_the_edge_follow_the_base(mesh):
    largest = replace(mesh, replicas=50)

    assert len(largest.fixed_ports) == 50 + 8
    assert all(mesh.port_base <= port < mesh.port_base + SPAN for port in largest.fixed_ports if port != mesh.edge_port)


def test_two_meshes_with_other_bases_share_no_port(mesh):
    other = replace(mesh, port_base=mesh.port_base + SPAN, edge_port=8081)

    assert not mesh.fixed_ports.keys() & other.fixed_ports.keys()


def test_the_usual_ports_of_brokers_and_registries_are_left_to_others(mesh):
    assert not {4369, 5672, 8300, 8301, 8500, 15672, 25672} & mesh.fixed_ports.keys()


def test_the_callers_environment_moves_the_mesh(tmp_path):
    moved = Layout.from_environment(
        {"ATELIER_VAR": str(tmp_path), "ATELIER_PORT_BASE": "20000", "ATELIER_EDGE_PORT": "9000"}
    )

    assert (moved.var, moved.edge_url, moved.consul_url) == (
        tmp_path,
        "http://127.0.0.1:9000",
        "http://127.0.0.1:20500",
    )


def test_a_silent_caller_means_the_mesh_as_it_was_last(tmp_path):
    last = Layout(var=tmp_path, port_base=20000, edge_port=9000, replicas=3)
    last.last.parent.mkdir()
    configs.remember(last)

    found = Layout.from_environment({"ATELIER_VAR": str(tmp_path), "ATELIER_EDGE_PORT": "9001"})

    assert found == replace(last, edge_port=9001)


@pytest.mark.parametrize(
    "setting",
    [
        {"ATELIER_PORT_BASE": "many"},
        {"ATELIER_EDGE_PORT": "0"},
        {"ATELIER_EDGE_PORT": "70000"},
        {"ATELIER_PORT_BASE": "65000"},
        {"ATELIER_EDGE_PORT": "17500"},
        {"ATELIER_VAR": "/" + "deep/" * 30},
        {"ATELIER_VAR": '/a"b'},
        {"ATELIER_DATABASE": "mysql"},
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(setting, tmp_path):
    with pytest.raises(SettingRefused, match=next(iter(setting))):
        Layout.from_environment({"ATELIER_VAR": str(tmp_path), **setting})


def test_the_data_of_a_mesh_stays_in_the_kind_of_database_that_it_began_with(mesh):
    mesh.last.parent.mkdir()
    configs.remember(replace(mesh, database="postgresql"))

    silent = Layout.from_environment({"ATELIER_VAR": str(mesh.var)})

    assert silent.database == "postgresql"
    with pytest.raises(SettingRefused, match="kept by postgresql"):
        Layout.from_environment({"ATELIER_VAR": str(mesh.var), "ATELIER_DATABASE": "sqlite"})


def test_a_database_elsewhere_that_is_not_named_again_is_no_reason_for_an_empty_one(mesh):
    asked = {"ATELIER_VAR": str(mesh.var)}
    named = {**asked, "TASK_DATABASE_URL": "postgresql+psycopg://task:secret@db.example/task"}
    require_databases(Layout.from_environment(asked))
    configs.make_folders(mesh)
    configs.remember(Layout.from_environment(named))

    require_databases(Layout.from_environment(named))
    with pytest.raises(CannotStart, match="TASK_DATABASE_URL said where the data is"):
        require_databases(Layout.from_environment(asked))

    assert "secret" not in mesh.last.read_text()


def test_postgresql_runs_where_it_is_asked_for_and_has_a_port_of_its_own(mesh):
    server = programs(replace(mesh, database="postgresql"))["postgresql"]

    assert "postgresql" not in programs(mesh)
    assert server.address == f"127.0.0.1:{mesh.postgresql_port}"
    assert mesh.postgresql_port not in mesh.fixed_ports
    assert mesh.postgresql_port in replace(mesh, database="postgresql").fixed_ports


def test_no_process_is_told_of_another_s_database(mesh):
    told = {
        (name.rpartition("-")[0], variable)
        for name, process in programs(mesh).items()
        for variable in process.environment
        if variable.endswith("_DATABASE_URL")
    }

    assert told == {(name, f"{name.upper()}_DATABASE_URL") for name in DATABASES}


def test_every_service_runs_as_often_as_asked(mesh):
    names = programs(mesh).keys()

    expected = {f"{name}-{number}" for name in (*SERVICES, *WORKERS, "control") for number in (1, 2)}
    assert {"task-1", "media-2", "media-worker-2"} <= expected
    assert names == expected | {"epmd", "consul", "rabbitmq", "registrar", "edge-certificates", "envoy"}


def test_each_instance_knows_its_name_and_where_the_mesh_is(mesh):
    told = programs(mesh)["task-2"].environment

    assert told["ATELIER_INSTANCE"] == "task-2"
    assert told["ATELIER_CONTROL_ADDRESSES"] == "127.0.0.1:17100,127.0.0.1:17101"
    assert told["ATELIER_BROKER_URL"] == "amqp://atelier:s3cret@127.0.0.1:17672/"
    assert told["TASK_DATABASE_URL"] == f"sqlite+aiosqlite:///{mesh.var}/data/task.db"


def test_a_service_setting_of_the_callers_wins_and_the_place_of_the_mesh_does_not(mesh):
    caller = {"TASK_LEASE_SECONDS": "3", "USER_DATABASE_URL": "sqlite+aiosqlite:////else.db", "ATELIER_CONSUL_URL": "x"}

    told = programs(mesh, {**caller, "SHELL": "/bin/sh"})["user-1"].environment

    assert told["TASK_LEASE_SECONDS"] == "3"
    assert told["USER_DATABASE_URL"] == "sqlite+aiosqlite:////else.db"
    assert told["ATELIER_CONSUL_URL"] == mesh.consul_url
    assert "SHELL" not in told


def test_two_meshes_and_two_replacing_envoys_share_nothing(mesh):
    other = replace(mesh, var=mesh.var / "other")

    assert mesh.edge_base_id != other.edge_base_id
    assert mesh.edge_base_id == replace(mesh, edge_port=8081).edge_base_id


def test_the_edge_starts_after_the_services_and_these_after_the_brokers(mesh):
    found = programs(mesh)

    waves = [found[name].wave for name in ("rabbitmq", "control-1", "task-1", "envoy")]
    assert waves == sorted(set(waves))
