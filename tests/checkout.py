"""A clean copy of this checkout that a test may change, with this one's packages installed into it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

from scripts.local import install

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"


def copied(folder: Path) -> Path:
    """Make `folder` such a copy, of what git knows or would; its scripts find nothing missing, and only its files."""
    if not install.fits(install.wanted_mark("runtime.txt", "overlay.txt")):
        raise RuntimeError("the virtual environment does not fit this checkout: scripts/test brings it up to date")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "var").mkdir()
    (folder / "var" / "tools").symlink_to(ROOT / "var" / "tools")
    if (ROOT / ".mypy_cache").exists():  # it is by paths from the root: what has not changed is not checked again
        shutil.copytree(ROOT / ".mypy_cache", folder / ".mypy_cache")
    _install(folder)
    return folder


def _install(folder: Path) -> None:
    """Make the copy's virtual environment: its own interpreter and sources, and the packages of ours."""
    fresh = folder / ".venv"
    venv.create(fresh, symlinks=True)
    for program in (VENV / "bin").iterdir():
        own = fresh / "bin" / program.name
        if own.exists() or program.is_dir():
            continue
        text = program.read_bytes()
        if text.startswith(b"#!"):  # names its interpreter, which knows where the sources are
            own.write_bytes(text.replace(str(VENV).encode(), str(fresh).encode()))
            own.chmod(0o755)
        else:
            own.symlink_to(program)
    sources = [folder, folder / "generated", folder / "client"]
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    # Of a folder that a .pth file names no .pth file is read, so that our own sources stay out.
    packages = VENV / "lib" / version / "site-packages"
    (fresh / "lib" / version / "site-packages" / "atelier-source.pth").write_text(
        "".join(f"{path}\n" for path in (*sources, packages))
    )
    for mark in ("lock", "lock-tests"):
        (fresh / mark).write_text((VENV / mark).read_text().replace(f"{ROOT} ", f"{folder} ", 1))
