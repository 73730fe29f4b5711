"""Broken images, and odd operations, through the worker's real child processes. Usage: scripts/fuzz."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from PIL import Image

from mesh.errors import MeshError
from services.media import domain, processes
from services.media.convert import operation_from
from services.media.domain import Fit, Format, Interest
from services.media.processes import Slot
from services.media.worker.weights import MANIFEST
from tests import drawn
from tests.hostile import picture, saved, seeds, transparent, turned
from tests.models import grey, learned_upscale, worker_config

Image.MAX_IMAGE_PIXELS = None  # headers alone are read here, and of our own files
FINDINGS = Path(__file__).resolve().parent.parent / "var" / "fuzz"
SECONDS = 30  # a few kilobytes that keep a machine busy for longer than this are a finding
BROKEN = frozenset({"INPUT_UNSUPPORTED", "INPUT_DAMAGED"})
REFUSED = frozenset({"IMAGE_TOO_LARGE", "OUTPUT_TOO_LARGE", "TARGET_UNREACHABLE", "ALREADY_SMALLEST", "TEXT_EMPTY"})
COSTLY = frozenset({"TIME_LIMIT_EXCEEDED", "OUT_OF_MEMORY"})  # sixteen results of 268 megapixels may be asked for
TYPED = BROKEN | REFUSED | COSTLY
HEADER_BYTES = 256
EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

WORKS: Sequence[domain.Work] = (
    domain.Resize(width=40),
    domain.Resize(width=40, height=40, fit=Fit.FILL, format=Format.GIF),
    domain.Convert(format=Format.PNG),
    domain.Convert(format=Format.WEBP),
    domain.Convert(format=Format.JPEG),
    domain.Convert(format=Format.PDF),
    domain.SmartCrop(width=30, height=30),
    domain.SmartCrop(width=30, height=30, interest=Interest.FACES),
    domain.Watermark(text=domain.Text(content="fuzz"), tiled=True),
    domain.Compress(max_bytes=2000, format=Format.WEBP),
    domain.Optimise(format=Format.JPEG),
    domain.Thumbnails(sizes=(domain.Resize(width=40), domain.Resize(width=20))),
    domain.Pipeline(
        steps=(
            domain.Step(resize=domain.Resize(width=50)),
            domain.Step(smart_crop=domain.SmartCrop(width=20, height=40)),
        )
    ),
)


@dataclass
class Told:
    """What a run saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0
    most_bytes: int = 0


def mutated(random: Random, files: Sequence[bytes]) -> bytes:
    """Return one of some files with something wrong in it."""
    content = bytearray(random.choice(files))
    for _ in range(random.choice((1, 1, 2, 4))):
        random.choice(MUTATIONS)(random, content, files)
    if content.startswith(b"\x89PNG") and random.random() < 0.8:
        _mend_checksums(content)  # else no more than these would be tried
    return bytes(content)


def _place(random: Random, content: bytearray) -> int:
    """Return where to break something: mostly where formats say what they are."""
    most = len(content) if random.random() < 0.4 else min(len(content), HEADER_BYTES)
    return random.randrange(most) if most else 0


def _flip(random: Random, content: bytearray, _: Sequence[bytes]) -> None:
    for _each in range(random.randint(1, 8)):
        if content:
            content[_place(random, content)] ^= 1 << random.randrange(8)


def _overwrite(random: Random, content: bytearray, _: Sequence[bytes]) -> None:
    at, kind = _place(random, content), random.choice("BHI")
    value = random.choice(EDGES) & (256 ** struct.calcsize(kind) - 1)
    content[at : at + struct.calcsize(kind)] = struct.pack(random.choice("<>") + kind, value)


def _cut(random: Random, content: bytearray, _: Sequence[bytes]) -> None:
    del content[_place(random, content) :]


def _drop(random: Random, content: bytearray, _: Sequence[bytes]) -> None:
    at = _place(random, content)
    del content[at : at + random.randint(1, 64)]


def _repeat(random: Random, content: bytearray, _: Sequence[bytes]) -> None:
    at = _place(random, content)
    content[at:at] = content[at : at + random.randint(1, 64)] * random.randint(1, 50)


def _splice(random: Random, content: bytearray, files: Sequence[bytes]) -> None:
    other = random.choice(files)
    content[_place(random, content) :] = other[random.randrange(len(other)) :]


def _noise(random: Random, content: bytearray, _: Sequence[bytes]) -> None:
    at = _place(random, content)
    content[at : at + 32] = random.randbytes(random.randint(1, 64))


Mutation = Callable[[Random, bytearray, Sequence[bytes]], None]
MUTATIONS: Sequence[Mutation] = (_flip, _flip, _overwrite, _overwrite, _cut, _drop, _repeat, _splice, _noise)


def _mend_checksums(png: bytearray) -> None:
    at = 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        if end + 4 > len(png):
            return
        png[end : end + 4] = struct.pack(">I", zlib.crc32(png[at + 4 : end]))
        at = end + 4


def shapes() -> Sequence[bytes]:
    """Return sound images: larger ones than `seeds`, and thin ones, whose sides are soon rounded to nothing."""
    dot, line, column = (picture().resize(size) for size in ((1, 1), (3000, 1), (2, 2500)))
    return (
        saved("PNG", dot),
        saved("GIF", dot),
        saved("JPEG", line),
        saved("PNG", transparent().resize((1, 4000))),
        saved("WEBP", column),
        saved("AVIF", line.resize((900, 17))),
        saved("GIF", line.resize((700, 1)), save_all=True, append_images=[each.resize((700, 1)) for each in turned()]),
        saved("WEBP", dot, save_all=True, append_images=[each.resize((1, 1)) for each in turned()]),
        saved("TIFF", column.convert("CMYK")),
        saved("JPEG", picture().resize((1200, 800)), quality=90),
        saved("PNG", transparent().resize((700, 500))),
    )


@dataclass(frozen=True, slots=True)
class Case:
    """The input, with what else the operation may name; the operation; and what may become of it beside a result."""

    inputs: Sequence[bytes]
    work: domain.Work
    typed: frozenset[str]


def case(random: Random, files: Sequence[bytes]) -> Case:
    """Return a broken image for an operation that does little, or an operation at random for images mostly sound."""
    if random.random() < 0.5:
        return Case([mutated(random, files)] * 3, random.choice(WORKS), BROKEN | REFUSED)
    sound = random.random() < 0.8
    inputs = [random.choice(files) if sound else mutated(random, files) for _ in range(3)]
    return Case(inputs, operation_from(drawn.operation(random)), REFUSED | COSTLY if sound else TYPED)


async def fuzz(seed: int, *, seconds: float, cases: int | None, folder: Path, keep: Path) -> Told:
    """Try broken images until the time is up.

    Args:
        seed: makes the cases.
        seconds: how long at most.
        cases: how many at most; None for as many as fit.
        folder: of the child, for its files.
        keep: where what was found goes.
    """
    told = Told()
    files = [*seeds().values(), *shapes()]
    config = worker_config(folder, slots=1, job_seconds=SECONDS, weights_dir=_weights(folder / "weights"))
    async with processes.opened(config) as (slot,):
        until, number = time.monotonic() + seconds, 0
        while time.monotonic() < until and (cases is None or number < cases):
            one = case(Random(f"{seed}/{number}"), files)
            outcome = await _tried(slot, one, told)
            told.outcomes[outcome] += 1
            if outcome != "done" and outcome not in one.typed:
                place = keep / f"{seed}-{number}"
                place.mkdir(parents=True, exist_ok=True)
                for each, content in enumerate(one.inputs):
                    (place / str(each)).write_bytes(content)
                told.findings.append(f"seed {seed}, case {number}: {outcome} · {one.work} · {place}")
            number += 1
    return told


def _weights(folder: Path) -> Path:
    """Make a folder of models that take no time."""
    folder.mkdir(parents=True)
    models = (grey(), learned_upscale())
    for model, content in models:
        (folder / model.file).write_bytes(content)
    (folder / MANIFEST).write_text(json.dumps([asdict(model) for model, _ in models]))
    return folder


async def _tried(slot: Slot, one: Case, told: Told) -> str:
    await slot.clear()
    slot.make_folder()
    source, *others = (slot.folder / f"input-{number}" for number in range(len(one.inputs)))
    for path, content in zip((source, *others), one.inputs, strict=True):
        path.write_bytes(content)
    files = dict(zip(drawn.FILE_IDS, others, strict=True))
    began = time.monotonic()
    try:
        written = await slot.run(one.work, source, files, slot.folder, lambda _share: None)
        _require_as_said(written)
    except MeshError as refusal:
        outcome = refusal.reason + (f" {refusal.metadata}" if refusal.reason == "WORKER_CRASHED" else "")
    except RuntimeError as bug:  # what no refusal stands for: the worker would say INTERNAL
        outcome = "bug: " + " · ".join(str(bug).strip().splitlines()[-3:])
    except AssertionError as lie:
        outcome = f"lie: {lie}"
    else:
        outcome = "done"
    told.slowest_seconds = max(told.slowest_seconds, time.monotonic() - began)
    if slot.pid:
        status = Path(f"/proc/{slot.pid}/status").read_text()
        told.most_bytes = max(told.most_bytes, 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0]))
    return outcome


def _require_as_said(results: Sequence[domain.Written]) -> None:
    """Raise AssertionError unless each result is what is said of it."""
    for each in results:
        if each.format is Format.PDF:
            said, found = b"%PDF", each.path.read_bytes()[:4]
            assert found == said, f"{each} is no PDF"
            continue
        with Image.open(each.path) as image:
            found = (image.format, image.size)
        assert found == (each.format.name, (each.width, each.height)), f"{each} is {found}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/fuzz")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="by default another one each time")
    parser.add_argument("--cases", type=int, default=None, help="by default as many as fit")
    given = parser.parse_args()
    seed = int(time.time()) if given.seed is None else given.seed
    with tempfile.TemporaryDirectory() as folder:
        told = asyncio.run(fuzz(seed, seconds=given.seconds, cases=given.cases, folder=Path(folder), keep=FINDINGS))
    print(f"seed {seed}: {told.outcomes.total()} cases")
    for outcome, count in told.outcomes.most_common():
        print(f"  {count:7}  {outcome}")
    print(f"slowest {told.slowest_seconds:.2f} s, most memory {told.most_bytes / 2**20:.0f} MiB")
    for finding in told.findings:
        print(finding)
    raise SystemExit(bool(told.findings))


if __name__ == "__main__":
    main()
