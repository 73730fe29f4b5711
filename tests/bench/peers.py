"""Peers of benchmarks: programs in environments of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from scripts.local.layout import ROOT, TOOLS


def python_with(name: str) -> Path:
    """Return a Python that has what `requirements/<name>.txt` locks, installed at the first run."""
    folder, wanted = TOOLS / name, (ROOT / "requirements" / f"{name}.txt").read_text()
    mark = folder / "lock"
    if not mark.exists() or mark.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        requirements = ROOT / "requirements" / f"{name}.txt"
        subprocess.run([*pip, "--require-hashes", "-r", requirements], check=True, stdout=sys.stderr)
        mark.write_text(wanted)
    return folder / "bin" / "python"
