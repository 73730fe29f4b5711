"""What cannot be installed is told before anything is touched."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import pytest

from scripts.local import install


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
