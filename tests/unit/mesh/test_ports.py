"""Where an instance is found again."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mesh.ports import Ports
from tests.ports import free_port
from tests.service.mesh.registry import Config, config


@pytest.fixture
def task(tmp_path: Path) -> Config:
    return config(tmp_path, "http://127.0.0.1:9")


def test_an_instance_wants_the_ports_that_it_had_last(task: Config) -> None:
    port = free_port()

    Ports(task).keep("grpc", port)

    assert Ports(task).wanted("grpc", 0) == port
    assert Ports(task).wanted("http", 0) == 0


def test_a_port_that_is_set_comes_before_the_last_one(task: Config) -> None:
    Ports(task).keep("grpc", free_port())

    assert Ports(task).wanted("grpc", 7) == 7


def test_a_last_port_that_somebody_else_has_is_left_to_him(task: Config) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        Ports(task).keep("grpc", taken.getsockname()[1])

        assert Ports(task).wanted("grpc", 0) == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"grpc": null}'])
def test_a_file_that_cannot_be_read_is_as_good_as_none(task: Config, content: str) -> None:
    path = task.data_dir / "ports" / "task-1.json"
    path.parent.mkdir()
    path.write_text(content)

    assert Ports(task).wanted("grpc", 0) == 0


def test_a_disk_that_takes_nothing_is_no_reason_not_to_serve(task: Config) -> None:
    (task.data_dir / "ports").touch()  # a file where the folder should be

    Ports(task).keep("grpc", 7)
