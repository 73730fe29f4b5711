"""The check that a contract changes only in ways that its callers bear."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from scripts.generate import place_google
from scripts.local.layout import BIN, ROOT
from scripts.local.test import breaking


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Make a repository of our contracts, committed once."""
    monkeypatch.setenv("PATH", str(BIN), prepend=":")
    place_google()
    for name in ("protos", "var/protos"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    (tmp_path / ".gitignore").write_text("/var/\n")
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(folder, *arguments: str) -> None:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "x")


def plant_a_change_of_type(folder) -> None:
    path = folder / "protos/atelier/storage/v1/storage.proto"
    text = path.read_text()
    assert "int64 size_bytes" in text
    path.write_text(text.replace("int64 size_bytes", "string size_bytes", 1))


def test_a_changed_field_type_is_refused_against_the_parent_commit(checkout):
    plant_a_change_of_type(checkout)
    commit(checkout)

    passed, said = breaking(checkout)

    assert not passed
    assert "size_bytes" in said


def test_a_release_stands_until_the_next_one(checkout):
    git(checkout, "tag", "v0.1.0")
    plant_a_change_of_type(checkout)
    commit(checkout)
    commit(checkout)

    passed, _ = breaking(checkout)

    assert not passed


def test_unchanged_contracts_pass_and_the_base_is_named(checkout):
    commit(checkout)

    assert breaking(checkout) == (True, "against HEAD~1")


def test_without_a_parent_commit_it_says_why_it_is_skipped(checkout):
    passed, said = breaking(checkout)

    assert passed
    assert said.startswith("skipped: ")
