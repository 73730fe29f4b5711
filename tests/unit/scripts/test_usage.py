"""Every script says how it is used."""

from __future__ import annotations

import subprocess

import pytest

from scripts.local.layout import ROOT


@pytest.mark.parametrize("name", ["up", "down", "status", "restart", "test", "bench", "protos", "lock"])
def test_a_script_prints_its_usage_and_does_nothing_else(name, tmp_path):
    done = subprocess.run(
        [ROOT / "scripts" / name, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0
    assert f"Usage: scripts/{name}" in done.stdout
    assert "set -" not in done.stdout
