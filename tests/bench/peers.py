"""Peers of benchmarks: programs in environments of their own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from scripts.local.layout import ROOT, TOOLS


def node_with(name: str) -> Path:
    """Return the folder of `node_modules` with what `requirements/<name>/` locks, installed at the first run."""
    folder, lock = TOOLS / name, ROOT / "requirements" / name
    if shutil.which("npm") is None:
        raise SystemExit("This needs Node.js and npm (Debian 12: apt-get install nodejs npm).")
    mark, wanted = folder / "lock", (lock / "package-lock.json").read_text()
    if not mark.exists() or mark.read_text() != wanted:
        shutil.copytree(lock, folder, dirs_exist_ok=True)
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, check=True, stdout=sys.stderr)
        mark.write_text(wanted)
    return folder


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
