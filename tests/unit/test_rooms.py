"""Who may import whom, what no service does for itself, and that the tools which say so notice."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.generate import place_google

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SOURCES = ("mesh", "services", "client")


def modules(folder: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run(*command: str, cwd: Path) -> tuple[int, str]:
    path = os.pathsep.join(str(cwd / each) for each in (".", "generated", "client"))
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the source that a test may spoil."""
    folder = tmp_path / "rooms"
    for each in SOURCES:
        shutil.copytree(ROOT / each, folder / each, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(folder: Path) -> tuple[int, str]:
    return run(str(BIN / "lint-imports"), "--no-cache", cwd=folder)


def test_the_rooms_are_kept(copy: Path) -> None:
    code, said = lint(copy)

    assert code == 0, said
    assert "0 broken" in said


PLANTED = {
    "services/user/handlers.py": ("import services.user.repository", "The files of a service have their places"),
    "services/task/upkeep.py": ("import services.user.domain", "Services meet through generated stubs only"),
    "services/user/domain.py": ("import asyncio", "What is pure does no I/O and sees no protobuf"),
    "services/auth/domain.py": ("import mesh.wire", "What is pure knows of the mesh its errors and its clock only"),
    "services/storage/keeping.py": ("import sqlalchemy", "Only repositories know SQL"),
    "services/storage/repository.py": ("import grpc", "Only what speaks on the wire knows protobuf"),
    "services/media/operations/__init__.py": ("import mesh.errors", "An operation is a function of pixels"),
    "client/atelier_client/__init__.py": ("import mesh.errors", "The client stands alone"),
    "mesh/clock.py": ("import services.task.domain", "The mesh knows no service"),
}


def test_whoever_enters_a_room_that_is_not_his_is_noticed(copy: Path) -> None:
    for path, (line, _) in PLANTED.items():
        with (copy / path).open("a") as file:
            file.write(f"\n{line}\n")

    code, said = lint(copy)

    assert code != 0
    assert [rule for _, rule in PLANTED.values() if f"{rule} BROKEN" not in said] == []


def test_a_file_that_has_no_place_in_a_service_is_noticed(copy: Path) -> None:
    (copy / "services/task/manager.py").touch()

    code, said = lint(copy)

    assert code != 0
    assert "services.task.manager" in said


def test_the_mesh_knows_no_contract_but_policy_and_its_own() -> None:
    known = ("atelier.policy.", "atelier.mesh.")
    wrong = [
        (str(path), name)
        for path, tree in modules("mesh")
        for name in imported(tree)
        if name.startswith("atelier.") and not name.startswith(known)
    ]

    assert wrong == []


CHANNELS_OF_THEIR_OWN = {
    "services/task/handlers.py": "CHANNEL = grpc.aio.insecure_channel('user:1')",
    "services/storage/peers.py": "from grpc.aio import secure_channel",
    "services/media/worker/__main__.py": "from grpc import aio; CHANNEL = aio.secure_channel('task:1', None)",
    "mesh/identity.py": "CHANNEL = grpc.insecure_channel('auth:1')",
}


def test_a_call_by_another_channel_than_the_meshs_is_noticed(copy: Path) -> None:
    """R-07: only on the mesh's channel has every stub a deadline."""
    for path, line in CHANNELS_OF_THEIR_OWN.items():
        with (copy / path).open("a") as file:
            file.write(f"\nimport grpc\n{line}\n")

    code, said = run(str(BIN / "ruff"), "check", "--no-cache", "--output-format=concise", "--select=TID251", cwd=copy)

    assert code != 0
    assert {line.split(":")[0] for line in said.splitlines() if "TID251" in line} == set(CHANNELS_OF_THEIR_OWN), said


def test_a_service_sets_no_status_itself() -> None:
    own = {"abort", "abort_with_status", "set_code", "set_details", "StatusCode"}
    wrong = [
        f"{path}:{node.lineno}"
        for path, tree in modules("services")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in own
    ]

    assert wrong == []


def contracts(folder: Path) -> Path:
    """Lay out a copy of the contracts with what they import, as scripts/protos does."""
    shutil.copytree(ROOT / "protos", folder / "protos")
    shutil.copy(ROOT / "buf.yaml", folder)
    place_google()
    shutil.copytree(ROOT / "var" / "protos", folder / "var" / "protos")
    return folder


@pytest.mark.parametrize(
    ("was", "now"),
    [("int32 page_size = 1", "int64 page_size = 1"), ("string page_token = 2", "string page_token = 9"), ("", "")],
    ids=["type", "number", "nothing"],
)
def test_a_contract_that_would_break_its_callers_is_noticed(tmp_path: Path, was: str, now: str) -> None:
    before, after = contracts(tmp_path / "before"), contracts(tmp_path / "after")
    changed = after / "protos/atelier/task/v1/task.proto"
    text = changed.read_text()
    assert was in text
    changed.write_text(text.replace(was, now))

    code, said = run(str(BIN / "buf"), "breaking", "--against", str(before), cwd=after)

    assert (code != 0) == (was != now), said
    assert ("ListTasksRequest" in said) == (was != now), said
