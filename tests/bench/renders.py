"""Renders through the edge against thumbor: a photograph of 12 megapixels at a page's width, made and made before."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.bench import peers
from tests.bench.report import Figures, arguments, tell
from tests.eventually import eventually
from tests.installation import Mesh, running
from tests.people import registered
from tests.photographs import twelve_megapixels
from tests.ports import free_port

CORES = os.cpu_count() or 1
REPLICAS = 2  # of our services, and processes of thumbor
WIDTH = 1024
WARM_CONNECTIONS = 16
WARM_SECONDS = 5
COLD_CONNECTIONS = 2 * CORES

HOW = (
    f"A JPEG of 4,000 x 3,000 at {WIDTH} pixels of width, as JPEG. Cold: each request another quality, "
    f"{COLD_CONNECTIONS} at a time by httpx. Warm: one that was made, by wrk, {WARM_CONNECTIONS} connections, "
    f"{WARM_SECONDS} s a round. Ours: Envoy (JWT, rate limit), {REPLICAS} replicas of media and of storage, which is "
    "asked each time whether the file is still the user's; what was made lies on disk. thumbor: "
    f"{REPLICAS} processes, its file loader and result storage, no accounts. All on the same cores, the load too."
)


@contextmanager
def thumbor(folder: Path, originals: Path) -> Iterator[str]:
    """Hold thumbor; yield its URL."""
    port = free_port()
    settings = folder / "thumbor.conf"
    settings.write_text(
        f"ALLOW_UNSAFE_URL = True\nLOADER = 'thumbor.loaders.file_loader'\nFILE_LOADER_ROOT_PATH = '{originals}'\n"
        "STORAGE = 'thumbor.storages.no_storage'\nRESULT_STORAGE = 'thumbor.result_storages.file_storage'\n"
        f"RESULT_STORAGE_FILE_STORAGE_ROOT_PATH = '{folder / 'results'}'\nPROGRESSIVE_JPEG = False\nQUALITY = 80\n"
        "RESULT_STORAGE_STORES_UNSAFE = True\n"
    )
    python = peers.python_with("thumbor")
    command = [python, "-m", "thumbor.server", "--ip", "127.0.0.1", "--port", str(port), "--conf", settings]
    with subprocess.Popen(
        [*command, "--processes", str(REPLICAS), "--log-level", "error"], stderr=subprocess.DEVNULL, process_group=0
    ) as peer:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(peer.pid, 15)


async def cold(http: httpx.AsyncClient, urls: list[str]) -> dict[str, float]:
    """Ask for each once; return how many came in a second, and how long they took."""
    waiting, took = iter(urls), []

    async def visitor() -> None:
        for url in waiting:
            sent = time.perf_counter()
            answer = await http.get(url)
            took.append(time.perf_counter() - sent)
            if answer.status_code != httpx.codes.OK or not answer.content.startswith(b"\xff\xd8"):
                raise RuntimeError(f"{answer.status_code}: {answer.text[:300]}")

    began = time.perf_counter()
    await asyncio.gather(*(visitor() for _ in range(COLD_CONNECTIONS)))
    seconds = time.perf_counter() - began
    return {
        "cold_rate": len(urls) / seconds,
        "cold_p50": 1000 * statistics.median(took),
        "cold_p99": 1000 * statistics.quantiles(took, n=100)[98],
    }


def warm(url: str, headers: Mapping[str, str]) -> dict[str, float]:
    command = ["wrk", "-t1", f"-c{WARM_CONNECTIONS}", f"-d{WARM_SECONDS}s", "--latency", "--timeout", "60s"]
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    text = subprocess.run([*command, url], check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"some answers were refusals:\n{text}")

    def found(pattern: str) -> tuple[str, ...]:
        match = re.search(pattern, text)
        assert match, text
        return match.groups()

    scale = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    (rate,), (p50, u50), (p99, u99) = (
        found(each) for each in (r"Requests/sec:\s+([\d.]+)", r"50%\s+([\d.]+)(us|ms|s)", r"99%\s+([\d.]+)(us|ms|s)")
    )
    return {"warm_rate": float(rate), "warm_p50": float(p50) * scale[u50], "warm_p99": float(p99) * scale[u99]}


async def measure(mesh: Mesh, peer: str, original: Path, rounds: int, requests: int) -> tuple[Figures, Figures]:
    ours, theirs = Figures("Atelier, through the edge"), Figures("thumbor")
    qualities = itertools.cycle(range(1, 100))  # each once: of neither are more asked for
    async with registered(mesh.url) as person, httpx.AsyncClient(timeout=60) as plain:
        file = await person.http.post("files", params={"name": "large.jpg"}, content=original.read_bytes())
        ask = f"files/{file.json()['fileId']}/render?width={WIDTH}"
        target = f"{peer}/unsafe/{WIDTH}x0"
        await eventually(lambda: plain.get(f"{target}/{original.name}"), within_seconds=30)
        for _ in range(4):  # every replica has it then
            (await person.http.get(ask)).raise_for_status()
            (await plain.get(f"{target}/{original.name}")).raise_for_status()
        for _ in range(rounds):
            await person.sign_in()  # a token lives five minutes
            some = list(itertools.islice(qualities, requests))
            with_ours = await cold(person.http, [f"{ask}&quality={quality}" for quality in some])
            with_theirs = await cold(
                plain, [f"{target}/filters:quality({quality})/{original.name}" for quality in some]
            )
            token = {"Authorization": person.http.headers["authorization"]}
            with_ours |= warm(f"{person.http.base_url}{ask}", token)
            with_theirs |= warm(f"{target}/{original.name}", {})
            ours.add(**with_ours)
            theirs.add(**with_theirs)
    return ours, theirs


def main() -> None:
    options = arguments(__doc__ or "", rounds=3, requests=30)
    if options.rounds * options.requests > 99:
        sys.exit("There are 99 qualities: fewer rounds or requests.")
    if not shutil.which("wrk"):
        sys.exit("This needs wrk: apt-get install wrk")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original = twelve_megapixels(folder / "large.jpg")
        unlimited = {"CONTROL_RATE_BYTES": "1000000:1000000", "CONTROL_RATE_READ": "1000000:1000000"}
        with running(folder / "var", replicas=REPLICAS, settings=unlimited) as mesh, thumbor(folder, folder) as peer:
            ours, theirs = asyncio.run(measure(mesh, peer, original, options.rounds, options.requests))
    units = {"cold_rate": "requests/s", "cold_p50": "ms", "cold_p99": "ms"}
    units |= {name.replace("cold", "warm"): unit for name, unit in units.items()}
    tell(
        "Renders of a 12-megapixel JPEG",
        HOW,
        [theirs, ours],
        units,
        {
            "thumbor, cold": ours.ratios("cold_rate", theirs),
            "thumbor, warm": ours.ratios("warm_rate", theirs),
        },
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
