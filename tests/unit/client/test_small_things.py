"""Addresses, files that are whole or not there, sizes, versions, completion."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from atelier_client import VERSION, client, credentials, shell
from atelier_client.command import cli
from atelier_client.files import written
from atelier_client.server import Server
from click.testing import CliRunner

import mesh
from mesh import contract

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("given", "url", "port", "tls"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080", 8080, False),
        ("https://Atelier.example/", "https://atelier.example:443", 443, True),
        ("localhost:9", "http://localhost:9", 9, False),
        ("http://[::1]:8080", "http://[::1]:8080", 8080, False),
    ],
)
def test_an_address_is_read(given: str, url: str, port: int, tls: bool) -> None:
    server = Server.parse(given)

    assert (server.url, server.port, server.tls) == (url, port, tls)


@pytest.mark.parametrize("given", ["", "ftp://a", "http://a/path", "http://a?b", "http://a:99999"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"address|[Pp]ort"):
        Server.parse(given)


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    with written(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"

    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"new", [path])


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    with pytest.raises(TypeError), written(path) as file:
        file.write("no bytes")

    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")

    with written(tmp_path / "link") as file:
        file.write(b"new")
    with written(Path(os.devnull)) as file:
        file.write(b"new")

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize(
    ("bytes_", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (1 << 30, "1.0 GiB"), (1 << 41, "2.0 TiB")]
)
def test_sizes_read_well(bytes_: int, text: str) -> None:
    assert shell.size(bytes_) == text


def test_command_and_mesh_have_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert VERSION == mesh.VERSION == project["version"]


def test_a_mistyped_command_is_guessed() -> None:
    outcome = CliRunner().invoke(cli, ["taks"])

    assert outcome.exit_code == 2
    assert "Did you mean tasks?" in outcome.output


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["run", "resize", "--help"], ["admin", "--help"]])
def test_every_command_explains_itself_and_takes_json(arguments: list[str]) -> None:
    outcome = CliRunner().invoke(cli, arguments)

    assert outcome.exit_code == 0
    assert "--json" in outcome.output


def test_shells_can_complete_commands() -> None:
    outcome = CliRunner().invoke(
        cli, [], env={"_ATELIER_COMPLETE": "bash_complete", "COMP_WORDS": "", "COMP_CWORD": "0"}
    )
    script = CliRunner().invoke(cli, ["completion", "zsh"])

    assert outcome.exit_code in (0, 2)
    assert "_ATELIER_COMPLETE=zsh_complete" in script.output


def test_the_server_s_deadlines_come_before_the_client_s() -> None:
    of_calls = {
        name: method.deadline_seconds
        for name, method in contract.installed().methods.items()
        if method.access in ("PUBLIC", "USER", "ADMIN") and not (method.server_streaming or method.bytes)
    }

    assert max(of_calls.values()) < client.CALL_SECONDS < client.REFRESH_EARLY.total_seconds()
    refresh = of_calls["/atelier.auth.v1.AuthService/RefreshTokens"]
    assert refresh < client.REFRESH_SECONDS < credentials.LOCK_SECONDS
