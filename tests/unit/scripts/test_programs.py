"""Who holds a port, what an earlier mesh left behind, how often a program died, what restarts together."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import replace

import pytest

from scripts.local import programs
from scripts.local.layout import MARKER, Layout, Process
from scripts.local.programs import CannotStart
from scripts.local.restart import in_turn, selected
from scripts.local.up import batches


@pytest.fixture
def mesh(tmp_path):
    return Layout(var=tmp_path)


@pytest.fixture
def sleeper():
    """Start `sleep` with a marker; ended at last."""
    started = []

    def start(marker: str) -> int:
        started.append(subprocess.Popen(["sleep", "60"], env={**os.environ, MARKER: marker}))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_taken_port_names_its_holder_and_the_way_out(mesh):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]

        with pytest.raises(CannotStart) as refusal:
            programs.require_free(replace(mesh, edge_port=port))

    assert f"{port} (wanted for the edge) is held by process {os.getpid()}:" in str(refusal.value)
    assert "ATELIER_EDGE_PORT=" in str(refusal.value)


def test_the_way_out_moves_all_ports_when_one_of_the_meshs_own_is_taken(mesh):
    said = programs.conflict(mesh.fixed_ports, {mesh.consul_port: "process 1: consul"})

    assert "17500 (wanted for Consul) is held by process 1: consul" in said
    assert "ATELIER_PORT_BASE=" in said


def test_only_what_this_meshs_supervisor_started_is_left_over(mesh, sleeper):
    ours, others = sleeper(str(mesh.var)), sleeper("/another/var")

    found = {process.pid for process in programs.leftovers(mesh)}

    assert ours in found
    assert others not in found


def test_leftovers_are_ended(mesh, sleeper):
    sleeper(str(mesh.var))

    programs.end(programs.leftovers(mesh))

    assert programs.leftovers(mesh) == []


def test_deaths_are_counted_and_stops_are_not(mesh):
    (mesh.logs).mkdir()
    (mesh.logs / "supervisord.log").write_text(
        "2026-01-01 00:00:00,000 INFO spawned: 'task-1' with pid 1\n"
        "2026-01-01 00:00:01,000 WARN exited: task-1 (terminated by SIGKILL; not expected)\n"
        "2026-01-01 00:00:02,000 INFO stopped: user-1 (exit status 0)\n"
        "2026-01-01 00:00:03,000 WARN exited: task-1 (exit status 1; not expected)\n"
    )

    assert programs.restarts(mesh) == {"task-1": 2}


def test_a_second_change_of_the_same_mesh_is_refused(mesh):
    mesh.socket.parent.mkdir()

    with programs.alone(mesh), pytest.raises(CannotStart), programs.alone(mesh):
        pass


def test_of_each_service_one_replica_restarts_at_a_time():
    named = [("envoy", 3), ("task-2", 2), ("user-1", 2), ("task-1", 2), ("consul", 0)]
    processes = [Process(name=name, wave=wave, command=(), environment={}) for name, wave in named]

    together = [{process.name for process in batch} for batch in batches(processes)]

    assert together == [{"consul"}, {"task-1", "user-1"}, {"task-2"}, {"envoy"}]


PRESENT = [
    Process(name=name, wave=wave, command=(), environment={})
    for name, wave in [
        ("consul", 0),
        ("postgresql", 0),
        ("registrar", 1),
        ("task-1", 2),
        ("task-2", 2),
        ("media-worker-1", 2),
        ("envoy", 3),
    ]
]


def names(processes: list[Process]) -> list[str]:
    return [process.name for process in processes]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ([], ["registrar", "task-1", "task-2", "media-worker-1", "envoy"]),
        (["task"], ["task-1", "task-2"]),
        (["task-2", "envoy"], ["task-2", "envoy"]),
        (["consul"], ["consul"]),
    ],
)
def test_a_name_means_a_program_or_all_replicas_of_one_and_none_means_all_that_is_ours(asked, meant):
    assert names(selected(PRESENT, asked)) == meant


@pytest.mark.parametrize("unknown", ["tasks", "media", "task-3"])
def test_a_name_that_means_nothing_is_refused_with_those_that_do(unknown):
    with pytest.raises(CannotStart, match=rf"no program {unknown}.*task-1"):
        selected(PRESENT, [unknown])


def test_programs_restart_in_the_order_of_a_start_and_replicas_of_one_service_apart():
    assert names(in_turn(PRESENT)) == [
        "consul",
        "postgresql",
        "registrar",
        "task-1",
        "media-worker-1",
        "task-2",
        "envoy",
    ]
