"""Images through the whole mesh and one worker, against libraries that do the same alone on the same cores."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pyvips

from scripts.local.layout import WEIGHTS
from services.media import domain, processes
from services.media.processes import Slot
from services.media.worker import weights
from services.media.worker.confined import NICE
from services.media.worker.models import RemoteModels
from tests.bench import peers
from tests.bench.report import Figures, arguments, tell
from tests.bench.watch import UNLIMITED, asked
from tests.installation import Mesh, running
from tests.models import worker_config
from tests.people import Person, registered
from tests.photographs import twelve_megapixels

CORES = os.cpu_count() or 1
MIB = 1024**2
LOOK_SECONDS = 0.05
HERE = Path(__file__).parent

CUT_OUTS = (
    "12-megapixel JPEGs, each another file, in; PNGs with transparency out. Ours: a batch of tasks through the edge, "
    "storage, broker and one worker, of one replica of each service on SQLite, until the last has ended; their uploads "
    "are not counted. rembg: files to files, its `u2netp` with the same weights, each round the faster of its default "
    f"(all cores for one image) and {CORES} processes with a core each, at our children's priority. Memory: the "
    "most of any one process that computes."
)
MODEL = (
    f"Items of 3 x 320 x 320 through u2netp. Ours: {CORES} threads that ask the worker's process with the models, one "
    "item each at a time, by its socket. onnxruntime: `InferenceSession.run` in a loop, with its own defaults, and the "
    "same priority."
)
ALONE = (
    "12-megapixel JPEGs, each another file, to JPEGs of at most 1,024 pixels a side, and to WebPs of their own size. "
    "Ours: a batch of tasks through the edge, storage, broker and one worker, one replica of each service on SQLite, "
    "until the last has ended; their uploads are not counted. A worker's processes: the same work, files to files, "
    "without anything around it. sharp: files to files by Node.js, each round the faster of its default and "
    f"{CORES} images at a time with a thread each. Pillow: {CORES} processes."
)
MEMORY = (
    "The most memory that the process had which decodes and encodes, for images of 12 and of 48 megapixels, each in a "
    "fresh process; by rembg all is one process."
)


def numbered(content: bytes, number: int) -> bytes:
    """Return a JPEG with a comment that makes it another file: the same work is not done twice."""
    comment = f"atelier {number}".encode()
    return content[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + content[2:]


async def signed_in(mesh: Mesh, person: Person, tasks: int) -> None:
    """Let somebody have as many tasks, and as much room, as a benchmark needs."""
    login = {"login": person.username, "secret": mesh.secret("admin")}
    await asked(person, "POST", f"{mesh.url}/api/v1/users:grantAdmin", json=login)
    await person.sign_in()
    quota = {"tasks": tasks}
    await asked(person, "POST", f"users/{person.user_id}/quota:set", json=quota)


async def done(person: Person, file_ids: list[str], operation: Mapping[str, Any]) -> float:
    """Have an operation done to files and return how long it took; all must succeed."""
    items = [{"inputFileId": file_id, "operation": operation} for file_id in file_ids]
    began = time.perf_counter()
    batch = await asked(person, "POST", f"{person.http.base_url}tasks:batch", json={"items": items})
    # The last one ends when all have or nearly so; who asks all the time takes what is measured from the services.
    (last,) = (await asked(person, "GET", "tasks", params={"batchId": batch["batchId"], "pageSize": 1}))["tasks"]
    while last["state"] in {"STATE_QUEUED", "STATE_RUNNING"}:
        last = await asked(person, "GET", f"tasks/{last['taskId']}", params={"wait": "20s"})
    batch = await asked(person, "GET", f"task-batches/{batch['batchId']}")
    while int(batch["stateCounts"]["succeeded"]) < len(items):
        if batch["stateCounts"]["failed"] or batch["stateCounts"]["cancelled"]:
            raise RuntimeError(f"not all tasks succeeded: {batch}")
        await asyncio.sleep(LOOK_SECONDS)
        batch = await asked(person, "GET", f"task-batches/{batch['batchId']}")
    return time.perf_counter() - began


def peak_bytes(process: psutil.Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


@contextmanager
def peer(*command: str | Path, **environment: str) -> Iterator[Callable[..., dict[str, float]]]:
    """Hold a program that is told on a line what to do to a folder's files, and says how long that took."""
    with subprocess.Popen(
        ["nice", "-n", str(NICE), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as running_:
        assert running_.stdin is not None
        assert running_.stdout is not None

        def do(folder: Path, *work: str) -> dict[str, float]:
            print(folder, *work, file=running_.stdin, flush=True)
            return json.loads(running_.stdout.readline())

        try:
            yield do
        finally:
            running_.stdin.close()


def rembg(processes_: int) -> AbstractContextManager[Callable[..., dict[str, float]]]:
    """Return rembg, which makes cut-outs of a folder's files."""
    return peer(peers.python_with("rembg"), HERE / "rembg_peer.py", str(processes_), U2NET_HOME=str(WEIGHTS))


def sharp(at_a_time: int) -> AbstractContextManager[Callable[..., dict[str, float]]]:
    program = peers.node_with("sharp") / "sharp_peer.mjs"  # Node.js looks for what it imports beside it
    shutil.copyfile(HERE / program.name, program)
    return peer("node", program, str(at_a_time))


def pillow() -> AbstractContextManager[Callable[..., dict[str, float]]]:
    return peer(sys.executable, HERE / "pillow_peer.py", str(CORES))


def folder_of(parent: Path, name: str, content: bytes, numbers: range) -> Path:
    """Return a new folder with numbered JPEGs."""
    folder = parent / name
    folder.mkdir()
    for number in numbers:
        (folder / f"{number}.jpg").write_bytes(numbered(content, number))
    return folder


async def uploaded(person: Person, content: bytes, numbers: range) -> list[str]:
    """Upload numbered JPEGs and return their ids."""
    await person.sign_in()
    found = []
    for number in numbers:
        body = numbered(content, number)
        file = await asked(person, "POST", "files", params={"name": f"{number}.jpg"}, content=body)
        found.append(file["fileId"])
    return found


async def computed(slots: Sequence[Slot], folder: Path, operation: domain.Work) -> float:
    """Have an operation done to a folder's files by a worker's processes alone, and return how long it took."""
    sources = [*folder.glob("*.jpg")]

    async def use(slot: Slot) -> None:
        while sources:
            slot.make_folder()
            await slot.run(operation, sources.pop(), {}, slot.folder, lambda _share: None)
            await slot.clear()

    began = time.perf_counter()
    await asyncio.gather(*map(use, slots))
    return time.perf_counter() - began


async def resize_and_convert(options: argparse.Namespace) -> None:
    """Time what libvips does, through all of Atelier and in a worker's processes alone, against sharp and Pillow."""
    resize = domain.Resize(width=1024, height=1024, format=domain.Format.JPEG)
    work: Mapping[str, tuple[Mapping[str, Any], domain.Work]] = {
        "resize": ({"resize": {"width": 1024, "height": 1024, "format": "FORMAT_JPEG"}}, resize),
        "convert": ({"convert": {"format": "FORMAT_WEBP"}}, domain.Convert(format=domain.Format.WEBP)),
    }
    # A resize takes a fifteenth of what a conversion or a cut-out takes: so each round is long enough to be even.
    counts = {"resize": options.images * 15, "convert": options.images * 2}
    count = max(counts.values())
    through, compute = "Atelier, all of it", "a worker's processes"
    async with AsyncExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        content = twelve_megapixels(root / "large.jpg").read_bytes()
        contestants = {
            "sharp": [stack.enter_context(sharp(at_a_time)) for at_a_time in sorted({1, CORES})],
            "Pillow": [stack.enter_context(pillow())],
        }
        found = {name: {kind: Figures(name) for kind in work} for name in (through, compute, *contestants)}
        config = worker_config(root / "worker", slots=2 * CORES, weights_dir=WEIGHTS)
        slots = await stack.enter_async_context(processes.opened(config))
        mesh = stack.enter_context(running(root / "var", settings=UNLIMITED))
        person = await stack.enter_async_context(registered(mesh.url))
        await signed_in(mesh, person, (options.rounds + 1) * sum(counts.values()))
        for round_ in range(options.rounds + 1):  # the first warms up
            file_ids = await uploaded(person, content, range(round_ * count, (round_ + 1) * count))
            for kind, (message, operation) in work.items():
                folder = folder_of(root, f"{kind}-{round_}", content, range(counts[kind]))
                taken = {
                    through: await done(person, file_ids[: counts[kind]], message),
                    compute: await computed(slots, folder, operation),
                }
                for name, variants in contestants.items():
                    taken[name] = min(do(folder, kind)["seconds"] for do in variants)
                shutil.rmtree(folder)
                if round_:
                    for name, seconds in taken.items():
                        found[name][kind].add(images=counts[kind] / seconds)
    for kind in work:
        ratios = {
            f"{peer_}, by {name}": found[name][kind].ratios("images", found[peer_][kind])
            for name in (through, compute)
            for peer_ in contestants
        }
        figures = [each[kind] for each in found.values()]
        tell(f"{kind.title()}, 12 megapixels", ALONE, figures, {"images": "per s"}, ratios, as_json=options.json)


async def remove_background(options: argparse.Namespace) -> None:
    """Time the whole path against rembg's."""
    ours, theirs = Figures("Atelier, all of it"), Figures("rembg")
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        content = twelve_megapixels(root / "large.jpg").read_bytes()
        variants = [stack.enter_context(rembg(count)) for count in sorted({1, CORES})]
        for number, cut_out in enumerate(variants):
            cut_out(folder_of(root, f"warm-{number}", content, range(CORES)))
        mesh = stack.enter_context(running(root / "var", settings=UNLIMITED))
        async with registered(mesh.url) as person:
            await signed_in(mesh, person, (options.rounds + 1) * options.images)
            for round_ in range(options.rounds + 1):  # the first warms up
                numbers = range(round_ * options.images, (round_ + 1) * options.images)
                seconds = await done(person, await uploaded(person, content, numbers), {"removeBackground": {}})
                if round_ == 0:
                    continue
                children = psutil.Process(mesh.pid("media-worker-1")).children()
                ours.add(images=len(numbers) / seconds, memory=max(map(peak_bytes, children)) / MIB)
                found = [
                    cut_out(folder_of(root, f"{round_}-{variant}", content, numbers))
                    for variant, cut_out in enumerate(variants)
                ]
                best = min(found, key=lambda each: each["seconds"])
                theirs.add(images=len(numbers) / best["seconds"], memory=best["peak_bytes"] / MIB)
    tell(
        "Background removed, 12 megapixels",
        CUT_OUTS,
        [ours, theirs],
        {"images": "per s", "memory": "MiB"},
        {theirs.name: ours.ratios("images", theirs)},
        as_json=options.json,
    )


async def model(options: argparse.Namespace) -> None:
    """Time the model alone against ONNX Runtime alone."""
    (described,) = weights.described(WEIGHTS)
    items = np.random.default_rng(1).random((options.images * 4, 3, 320, 320), np.float32)
    ours, theirs = Figures("the worker's models"), Figures("onnxruntime")
    # On Linux a thread has a priority of its own, and hands it to those that it starts.
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(CORES) as threads,
        ThreadPoolExecutor(1, initializer=os.nice, initargs=(NICE,)) as alone,
    ):
        bare = alone.submit(onnxruntime.InferenceSession, weights.read(WEIGHTS, described)).result()
        async with processes.opened(worker_config(Path(folder), slots=CORES, weights_dir=WEIGHTS)) as slots:
            models = RemoteModels(slots[0].inference.address, [described])

            def asked_all() -> float:
                began = time.perf_counter()
                list(threads.map(lambda item: models.run(described, item[None]), items))
                return time.perf_counter() - began

            def run_all() -> float:
                began = time.perf_counter()
                for item in items:
                    bare.run([bare.get_outputs()[0].name], {bare.get_inputs()[0].name: item[None]})
                return time.perf_counter() - began

            turns = [(ours, asked_all), (theirs, lambda: alone.submit(run_all).result())]
            for round_ in range(options.rounds + 1):  # the first warms up
                # In another order each time: a machine that becomes slower does so to both.
                for figures, run in turns[:: 1 if round_ % 2 else -1]:
                    seconds = await asyncio.to_thread(run)
                    if round_:
                        figures.add(items=len(items) / seconds)
    units, ratios = {"items": "per s"}, {theirs.name: ours.ratios("items", theirs)}
    tell("The model alone", MODEL, [ours, theirs], units, ratios, as_json=options.json)


async def memory(options: argparse.Namespace) -> None:
    """Tell what a megapixel more takes."""
    ours, theirs = Figures("the worker's process"), Figures("rembg")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        small = pyvips.Image.new_from_file(str(twelve_megapixels(root / "large.jpg")))
        small.resize(2).write_to_file(str(root / "huge.jpg"))
        peaks: dict[str, list[float]] = {"ours": [], "theirs": [], "model": []}
        for size in ("large", "huge"):
            async with processes.opened(worker_config(root / size, slots=1, weights_dir=WEIGHTS)) as (slot, *_):
                source = root / f"{size}.jpg"
                slot.make_folder()
                await slot.run(domain.RemoveBackground(), source, {}, slot.folder, lambda _share: None)
                assert slot.inference.process is not None
                peaks["ours"].append(peak_bytes(psutil.Process(slot.pid)) / MIB)
                peaks["model"].append(peak_bytes(psutil.Process(slot.inference.process.pid)) / MIB)
            with rembg(1) as cut_out:
                found = cut_out(folder_of(root, f"rembg-{size}", (root / f"{size}.jpg").read_bytes(), range(1)))
                peaks["theirs"].append(found["peak_bytes"] / MIB)
    for figures, peak in ((ours, peaks["ours"]), (theirs, peaks["theirs"])):
        figures.add(at_12=peak[0], at_48=peak[1], per_megapixel=(peak[1] - peak[0]) / 36)
    units = {"at_12": "MiB", "at_48": "MiB", "per_megapixel": "MiB"}
    said = f"{MEMORY} The process with the models had {peaks['model'][1]:.0f} MiB."
    tell("Memory of one background removed", said, [ours, theirs], units, {}, as_json=options.json)


CONTESTS = (resize_and_convert, remove_background, model, memory)


def main() -> None:
    options = arguments(__doc__ or "", rounds=3, images=8)
    for contest in CONTESTS:
        asyncio.run(contest(options))


if __name__ == "__main__":
    sys.exit(main())
