"""What cannot be installed is told before anything is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from scripts.local import install
from scripts.local.layout import ROOT


def test_a_missing_package_names_the_command_that_an_administrator_must_run(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    with pytest.raises(install.CannotInstall, match="sudo apt-get install -y --no-install-recommends rabbitmq-server"):
        install.install_packages(["rabbitmq-server"])


def test_a_full_disk_is_told_before_anything_is_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))

    with pytest.raises(install.CannotInstall, match="10 MB free, installing needs 1500 MB"):
        install.require_room(tmp_path)


def test_a_changed_lock_file_asks_for_another_environment():
    assert install.wanted_mark("runtime.txt") != install.wanted_mark("runtime.txt", "overlay.txt")


@pytest.mark.parametrize(
    ("on_the_path", "chosen"),
    [
        (["plain", "profiled", "profiled"], 1),
        (["too old", "bare", "plain"], 2),
        (["bare", "too old", "bare"], 0),
        (["too old", "broken"], None),
    ],
)
def test_the_quicker_python_of_those_on_the_path_is_chosen(tmp_path, on_the_path, chosen):
    folders = [tmp_path / str(number) for number in range(len(on_the_path))]
    for folder, says in zip(folders, on_the_path, strict=True):
        folder.mkdir()
        python = folder / "python3.11"
        python.write_text("#!/bin/sh\nexit 1\n" if says == "broken" else f"#!/bin/sh\necho '{says}'\n")
        python.chmod(0o755)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "dirname"):
        (programs / name).symlink_to(str(shutil.which(name)))

    said = subprocess.run(
        ["bash", "-c", "source scripts/local/begin.sh; chosen_python"],
        cwd=ROOT,
        env={"PATH": ":".join(map(str, [*folders, programs]))},
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert said.strip() == ("" if chosen is None else str(folders[chosen] / "python3.11"))
