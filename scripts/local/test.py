"""Runs every check and every test. Run by `scripts/test`, which installs first."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.local.layout import BIN, ROOT

MAX_RUN_AGAIN = 10  # one mesh that does not start fails all that share it; more than that is no coincidence

# Half of the time goes by in waiting for Consul. More at a time would take the processor from tests of who is quick.
SIDE_BY_SIDE = ("--numprocesses=2", "--no-loadscope-reorder")


def main(arguments: list[str]) -> int:
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    checks: dict[str, Callable[[], tuple[bool, str]]] = {
        "ruff check": lambda: command("ruff", "check"),
        "ruff format": lambda: command("ruff", "format", "--check"),
        "mypy": lambda: command("mypy"),
        "lint-imports": lambda: command("lint-imports"),
        "generated is fresh": lambda: command(sys.executable, "-m", "scripts.generate", "--check"),
        "buf lint": lambda: command("buf", "lint"),
        "buf format": lambda: command("buf", "format", "--diff", "--exit-code", "protos"),
        "buf breaking": lambda: breaking(ROOT),
    }
    failed = []
    for name, check in checks.items():
        began = time.monotonic()
        print(f"{name:<20}", end="", flush=True)
        passed, said = check()
        print(f"{'ok' if passed else 'FAILED'}  {time.monotonic() - began:.1f} s", flush=True)
        if said and (not passed or name == "buf breaking"):
            print("    " + said.strip().replace("\n", "\n    "), flush=True)
        if not passed:
            failed.append(name)
    print(f"Checks that failed: {', '.join(failed)}" if failed else "All checks passed.", flush=True)
    return tested(arguments) or (1 if failed else 0)


def tested(arguments: list[str]) -> int:
    """Run the tests, a few that failed once more, and return pytest's exit code.

    Thousands of tests on real processes and real clocks meet a busy machine now and then. What fails twice fails; what
    then passes is named at the end, since it is a defect all the same: docs/decisions/0020-failed-once.md.
    """
    run = [sys.executable, "-m", "pytest", *arguments]
    alone = arguments or "ATELIER_TEST_MEASURED" in os.environ  # what is measured has the machine for itself
    code = subprocess.run(run if alone else [*run, *SIDE_BY_SIDE], cwd=ROOT, check=False).returncode
    failures = [] if code != pytest.ExitCode.TESTS_FAILED else failed_last()
    if not 0 < len(failures) <= MAX_RUN_AGAIN:
        return code
    print(f"\nOnce more, since they failed: {len(failures)}", flush=True)
    again = subprocess.run([*run, "--last-failed"], cwd=ROOT, check=False).returncode
    if again == pytest.ExitCode.OK:
        print("FLAKY: these failed, and passed when run again; why is above, and each is a defect:")
        print(*failures, sep="\n", flush=True)
    return again


def failed_last() -> list[str]:
    """Return the tests that pytest's cache says have failed."""
    return list(json.loads((ROOT / ".pytest_cache" / "v" / "cache" / "lastfailed").read_text()))


def command(*parts: str, cwd: Path = ROOT) -> tuple[bool, str]:
    done = subprocess.run(parts, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode == 0, done.stdout


def breaking(root: Path) -> tuple[bool, str]:
    """Compare the contracts with the last release, or before the first one with the parent commit."""
    tagged, tag = command("git", "describe", "--tags", "--abbrev=0", "--match", "v*", cwd=root)
    base = tag.strip() if tagged else "HEAD~1"
    if not command("git", "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}", cwd=root)[0]:
        return True, "skipped: there is neither a release nor a parent commit to compare with"
    if not command("git", "cat-file", "-e", f"{base}:protos", cwd=root)[0]:
        return True, f"skipped: {base} has no contracts to compare with"
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", base, "protos"], cwd=root, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        # Not of that commit, but the same: what the commit has not is google/api, which is never committed.
        shutil.copy(root / "buf.yaml", folder)
        shutil.copytree(root / "var" / "protos", Path(folder) / "var" / "protos")
        passed, said = command("buf", "breaking", "--against", folder, cwd=root)
    return passed, said or f"against {base}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
