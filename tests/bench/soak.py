"""Thousands of tasks through the whole mesh: does any process grow with what it has done?"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from tests.bench.watch import UNLIMITED, asked
from tests.installation import Mesh, running
from tests.people import Person, registered
from tests.photographs import photograph

TASKS = 20_000
BATCH = 250  # of the contract's 1,000, so that memory is looked at often
LOOK_SECONDS = 0.5  # between two looks whether a batch has ended
SIGN_IN_SECONDS = 200  # a token lives five minutes
CHILDREN = "its children"
WATCHED = ("task", "user", "storage", "auth", "media", "media-worker")

# What is done to one photograph, the task's number within: each is other work, or it would be done once.
OPERATIONS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "resize": lambda number: {"resize": {"width": 16 + number // 100, "quality": 1 + number % 100}},
    "removeBackground": lambda number: {"removeBackground": {"colour": f"#{number:06x}", "format": "FORMAT_JPEG"}},
}

HOW = (
    "One replica of each service and one worker, SQLite; {operation} of a photograph of 640 x 427 pixels, by batches "
    "of {batch} through the edge, the next when all of one have ended. After each, the resident memory of each "
    "process. The slope is that of a straight line through the second half of them (least squares), so that what "
    "pools and caches take once is not in it. Children of the worker, the one with the models too, are replaced after "
    "500 tasks each: theirs is told as a sum."
)


@dataclass
class Growth:
    """Resident memory of one process, or of some together, by how many tasks were done."""

    name: str
    tasks: list[int] = field(default_factory=list)
    bytes_: list[int] = field(default_factory=list)

    def slope(self) -> float:
        """Return bytes a task, over the second half."""
        half = len(self.tasks) // 2
        return statistics.linear_regression(self.tasks[half:], self.bytes_[half:]).slope


async def soak(mesh: Mesh, count: int, operation: str) -> list[Growth]:
    """Do `count` tasks and return how each process grew meanwhile; one that dies of it fails the run."""
    processes = {name: psutil.Process(pid) for service in WATCHED for name, pid in mesh.pids(service).items()}
    growths = {name: Growth(name) for name in (*processes, CHILDREN)}
    async with registered(mesh.url) as person:
        login = {"login": person.username, "secret": mesh.secret("admin")}
        await asked(person, "POST", f"{mesh.url}/api/v1/users:grantAdmin", json=login)
        await person.sign_in()
        await asked(person, "POST", f"users/{person.user_id}/quota:set", json={"tasks": 2 * count})
        path = photograph()
        file = await asked(person, "POST", "files", params={"name": path.name}, content=path.read_bytes())
        for done in range(BATCH, count + 1, BATCH):
            items = [
                {"inputFileId": file["fileId"], "operation": OPERATIONS[operation](number)}
                for number in range(done, done + BATCH)
            ]
            await do_batch(person, items)
            memory = {name: process.memory_info().rss for name, process in processes.items()}
            memory[CHILDREN] = sum(child.memory_info().rss for child in processes["media-worker-1"].children())
            for name, growth in growths.items():
                growth.tasks.append(done)
                growth.bytes_.append(memory[name])
            print(f"{done:,} of {count:,}", file=sys.stderr)
    return list(growths.values())


async def do_batch(person: Person, items: list[dict[str, Any]]) -> None:
    """Have a batch of tasks done, all of which must succeed."""
    await person.sign_in()
    signed_in = time.monotonic()
    batch = await asked(person, "POST", f"{person.http.base_url}tasks:batch", json={"items": items})
    while int(batch["stateCounts"]["succeeded"]) < len(items):
        if batch["stateCounts"]["failed"] or batch["stateCounts"]["cancelled"]:
            raise RuntimeError(f"not all tasks succeeded: {batch}")
        await asyncio.sleep(LOOK_SECONDS)
        if time.monotonic() > signed_in + SIGN_IN_SECONDS:
            await person.sign_in()
            signed_in = time.monotonic()
        batch = await asked(person, "GET", f"task-batches/{batch['batchId']}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tasks", type=int, default=TASKS, help=f"how many (default {TASKS:,})")
    parser.add_argument("--operation", choices=OPERATIONS, default="resize", help="what they do (default resize)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, running(Path(name) / "var", settings=UNLIMITED) as mesh:
        began = time.monotonic()
        growths = asyncio.run(soak(mesh, options.tasks, options.operation))
        seconds = time.monotonic() - began
    how = HOW.format(operation=options.operation, batch=BATCH)
    tell(growths, options.tasks / seconds, how, as_json=options.json)


def tell(growths: list[Growth], tasks_a_second: float, how: str, *, as_json: bool) -> None:
    if as_json:
        slopes = {each.name: round(each.slope(), 1) for each in growths}
        figures = {each.name: each.bytes_ for each in growths}
        found = {"how": how, "tasks": growths[0].tasks, "bytes_a_task": slopes, "bytes": figures}
        print(json.dumps(found))
        return
    table = Table(title=f"Resident memory over {growths[0].tasks[-1]:,} tasks ({tasks_a_second:,.0f} a second)")
    table.add_column("")
    for heading in ("first, MiB", "middle, MiB", "last, MiB", "slope of the second half, bytes a task"):
        table.add_column(heading, justify="right")
    for each in growths:
        seen = (each.bytes_[0], each.bytes_[len(each.bytes_) // 2], each.bytes_[-1])
        table.add_row(each.name, *(f"{bytes_ / 1024**2:,.1f}" for bytes_ in seen), f"{each.slope():+,.0f}")
    console = Console()
    console.print(table)
    console.print(how)


if __name__ == "__main__":
    main()
