"""Compiles protos/ into generated/. Run by `scripts/protos`."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ROOT / "generated"
GOOGLE = {"api": ("annotations.proto", "http.proto", "httpbody.proto"), "rpc": ("status.proto",)}  # what ours import
BIN = Path(sys.executable).parent


def place_google() -> None:
    """Copy Google's contracts from googleapis-common-protos to where buf.yaml expects them."""
    for package, names in GOOGLE.items():
        target = ROOT / "var" / "protos" / "google" / package
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copyfile(str(files(f"google.{package}") / name), target / name)


def generate(out: Path) -> None:
    """Write image.binpb, openapi.json and the Python modules of every first-party contract to `out`."""
    image = out / "image.binpb"
    subprocess.run([BIN / "buf", "build", "-o", image], cwd=ROOT, check=True)
    protos = sorted(str(p.relative_to(ROOT / "protos")) for p in (ROOT / "protos").rglob("*.proto"))
    # buf has no Python gRPC plugin offline; protoc reads the image that buf checked instead.
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc",
            f"--descriptor_set_in={image}",
            f"--python_out={out}", f"--grpc_python_out={out}",
            f"--mypy_out={out}", f"--mypy_grpc_out={out}",
            *protos,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
    )  # fmt: skip
    for package in {Path(proto).parent for proto in protos}:
        (out / package / "py.typed").touch()
    # A process of its own: it must read the options of these contracts by these modules, not by those before.
    subprocess.run(
        [sys.executable, "-m", "scripts.openapi", image, out / "openapi.json"],
        cwd=ROOT,
        check=True,
        env={**os.environ, "PYTHONPATH": str(out)},
    )


def differences(left: Path, right: Path) -> list[str]:
    """Return the paths, relative to both, which differ or stand on one side only."""
    names = {
        str(path.relative_to(side))
        for side in (left, right)
        for path in side.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return sorted(
        name
        for name in names
        if not (left / name).exists()
        or not (right / name).exists()
        or not filecmp.cmp(left / name, right / name, shallow=False)
    )


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("usage: scripts/protos [--check]", file=sys.stderr)
        return 2
    place_google()
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        stale = differences(fresh, GENERATED)
        if arguments and stale:
            print("generated/ is stale; run scripts/protos. Differing:", *stale, sep="\n  ")
            return 1
        if stale:
            shutil.rmtree(GENERATED, ignore_errors=True)
            shutil.copytree(fresh, GENERATED)
    print(f"generated/ is fresh{'' if not stale else f' ({len(stale)} files written)'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
