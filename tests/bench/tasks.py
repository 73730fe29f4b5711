"""Durable tasks from submission to their end, against Celery and Dramatiq on the same broker and database."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import uvloop
from atelier.task.v1 import task_pb2, task_pb2_grpc

from mesh import broker, certificates, channel
from mesh.broker import Delivery
from mesh.together import Together
from scripts.local import postgresql
from scripts.local.layout import BIN, ROOT, Layout, mesh_environment
from services.media.config import WorkerConfig
from services.media.worker.capacity import CPU
from services.media.worker.tasks import QUEUES, completed
from tests.bench.peers import python_with
from tests.bench.report import Figures, arguments, tell
from tests.eventually import eventually
from tests.installation import Mesh, running
from tests.people import Person, registered
from tests.photographs import photograph

WORKERS = 2  # processes
IN_HAND = 100  # tasks of a worker of ours at a time
REST_SECONDS = 0.1  # between two rounds of claims, unless there may be more
THREADS = 4  # of a worker process of Dramatiq
# Who waits takes no core: more may. Celery is the fastest so, of 4 to 32 children, and of 16 and 32 threads.
WAITING_CHILDREN, WAITING_THREADS = 8, 16
BATCH = 1000
MAX_SECONDS = 600.0  # of a round
LATENCIES = 400  # submissions of one task each, at half of what was the capacity
AT_A_TIME = 32  # of such submissions, when their capacity is sought
WARM = 32  # tasks with which a round's workers begin, before anything is measured
SETTLED_SECONDS = 3.0  # after which nothing is left over of as many tasks as can be done

UNLIMITED = {"CONTROL_RATE_READ": "1000000:1000000", "CONTROL_RATE_WRITE": "1000000:1000000"}
OURS_ENDED = "SELECT count(*) FROM task WHERE end_time IS NOT NULL"
CELERY_ENDED = "SELECT count(*) FROM celery_taskmeta WHERE status = 'SUCCESS'"
DRAMATIQ_ENDED = "SELECT count(*) FROM dramatiq_done"

HOW = (
    "Submitted by one program as fast as it can, until all have ended; {count} tasks a round. {workers} worker "
    "processes each, the same RabbitMQ and PostgreSQL, nobody else's workers beside; where a job waits, as for a GPU, "
    "Celery has {children} and Dramatiq {threads} threads in each. Ours: batches of 1,000 by JSON through the edge; "
    "owner, files and quota checked, an idempotency key, history, events settled in quota. Celery: quorum queue, "
    "publisher confirms, late acknowledgement, results in PostgreSQL. Dramatiq: classic durable queue (it knows no "
    "other), publisher confirms, a row in PostgreSQL at the end. Capacity is the throughput of tasks that are "
    "submitted one in a call, which Celery's and Dramatiq's always are; latency is of such submissions at half of it, "
    "once what is left over of the full rate is done. SQLite: ours, with that instead."
)


@dataclass(frozen=True, slots=True)
class Job:
    """What a task is: so many seconds of a core, or of waiting, as for a GPU."""

    name: str
    seconds: float = 0.0
    waits: bool = False


JOBS = (Job("no-op"), Job("5 ms of a core", 0.005), Job("5 ms of waiting", 0.005, waits=True))


class NoOps:
    """A worker for tasks that need no file: it claims and completes many of them in one call."""

    def __init__(self, tasks: task_pb2_grpc.TaskServiceAsyncStub, worker_id: str, job: Job) -> None:
        self._tasks = tasks
        self._worker_id = worker_id
        self._job = job
        self._room = IN_HAND
        self._freed = asyncio.Event()
        self._complete = Together(partial(completed, tasks), at_most=IN_HAND)

    async def run(self, permits: asyncio.Queue[asyncio.Future[None]]) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                taken = [await permits.get()]
                while not permits.empty():
                    taken.append(permits.get_nowait())
                more = await self._claim(group)
                for permit in taken:
                    permit.set_result(None)
                while more:
                    more = await self._claim(group)
                await asyncio.sleep(REST_SECONDS)  # what comes meanwhile is claimed together

    async def _claim(self, group: asyncio.TaskGroup) -> bool:
        """Do what can be claimed; tell whether there may be more."""
        while not self._room:
            self._freed.clear()
            await self._freed.wait()
        request = task_pb2.ClaimTaskRequest(pool=CPU, worker_id=self._worker_id, max_tasks=self._room)
        claim = await self._tasks.ClaimTask(request)
        assignments = [claim.assignment, *claim.others] if claim.HasField("assignment") else []
        self._room -= len(assignments)
        for assignment in assignments:
            if self._job.seconds and not self._job.waits:
                end = time.perf_counter() + self._job.seconds
                while time.perf_counter() < end:
                    pass
            group.create_task(self._end(assignment.task))
            if self._job.seconds:  # else all are completed in one call
                await asyncio.sleep(0)
        return claim.more

    async def _end(self, task: task_pb2.Task) -> None:
        if self._job.waits:
            await asyncio.sleep(self._job.seconds)
        outputs = [task.input_file_id]
        await self._complete(
            task_pb2.CompleteTaskRequest(task_id=task.task_id, attempt=task.attempt, output_file_ids=outputs)
        )
        self._room += 1
        self._freed.set()


async def work(job: Job) -> None:
    config, loop = WorkerConfig(), asyncio.get_running_loop()
    permits: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()

    async def take(_permit: Delivery) -> None:
        permit = loop.create_future()
        permits.put_nowait(permit)
        await permit

    async with (
        certificates.kept(config) as leaf,
        broker.opened(config.broker_url) as bus,
        channel.opened("task", config, leaf) as tasks,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(bus.consume(QUEUES[CPU], take, prefetch=IN_HAND))
        group.create_task(NoOps(task_pb2_grpc.TaskServiceStub(tasks), config.instance, job).run(permits))


class Contestant:
    """Whoever does tasks.

    Args:
        working: holds its workers; those of others are not there meanwhile.
        submit: queues `count` tasks, `rate` a second or as fast as it can (0); returns what each call took, seconds.
        ended: returns how many have ended, ever.
        submit_singly: queues `count` tasks as fast as it can, one in a call, where `submit` would put many in one.
    """

    def __init__(
        self,
        figures: Figures,
        working: Callable[[], AbstractContextManager[None]],
        submit: Callable[[int, float], list[float]],
        ended: Callable[[], int],
        submit_singly: Callable[[int], object] | None = None,
    ) -> None:
        self.figures = figures
        self._working = working
        self._submit = submit
        self._ended = ended
        self._submit_singly = submit_singly

    def round(self, count: int) -> None:
        with self._working():
            self._rate(partial(self._submit, WARM, 0), WARM)
            self._measure(count)

    def _measure(self, count: int) -> None:
        gc.collect()  # now, and not while somebody's latency is taken: it holds the submitter up for 50 ms
        gc.freeze()
        throughput = self._rate(lambda: self._submit(count, 0), count)
        capacity = throughput
        if self._submit_singly is not None:
            capacity = self._rate(partial(self._submit_singly, LATENCIES), LATENCIES)
        time.sleep(SETTLED_SECONDS)
        before = self._ended()
        taken = sorted(self._submit(LATENCIES, capacity / 2))
        self._until(before + LATENCIES)
        self.figures.add(
            throughput=throughput,
            capacity=capacity,
            median_latency=taken[len(taken) // 2] * 1000,
            p99_latency=taken[int(len(taken) * 0.99)] * 1000,
        )

    def _rate(self, submit: Callable[[], object], count: int) -> float:
        """Return how many tasks a second were done, from their submission."""
        before, began = self._ended(), time.perf_counter()
        submit()
        return count / (self._until(before + count) - began)

    def _until(self, ended: int) -> float:
        deadline = time.perf_counter() + MAX_SECONDS
        while (present := self._ended()) < ended:
            if time.perf_counter() > deadline:
                raise RuntimeError(f"{self.figures.name}: only {present} of {ended} tasks have ended")
            time.sleep(0.05)
        return time.perf_counter()


@contextmanager
def programs(command: list[Any], environment: dict[str, str], count: int = 1) -> Iterator[None]:
    """Hold `count` processes; NUMBER in their environment is theirs."""
    started = [
        subprocess.Popen(
            command,
            env={name: value.replace("NUMBER", str(number)) for name, value in environment.items()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if "BENCH_LOUD" not in os.environ else None,
            cwd=ROOT,
        )
        for number in range(count)
    ]
    try:
        yield
    finally:
        for each in started:
            each.terminate()
        for each in started:
            with suppress(subprocess.TimeoutExpired):
                each.wait(20)
            each.kill()


@contextmanager
def ours(mesh: Mesh, name: str, job: Job, ended: Callable[[], int]) -> Iterator[Contestant]:
    layout = Layout.from_environment(mesh.environment)
    environment = {**os.environ, **mesh_environment(layout, {}, mesh.secret("broker"))}
    code = f"import uvloop; from tests.bench import tasks; uvloop.run(tasks.work(tasks.{job!r}))"
    # The real worker makes room for those that need no file.
    subprocess.run(
        [BIN / "supervisorctl", "-s", f"unix://{layout.socket}", "stop", "media-worker-1"], check=True, stdout=2
    )
    working = partial(
        programs, [sys.executable, "-c", code], {**environment, "ATELIER_INSTANCE": "media-worker-1NUMBER"}, WORKERS
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        holding = customer(mesh)
        person, http, file_id = runner.run(holding.__aenter__())
        item = {"inputFileId": file_id, "operation": {"resize": {"width": 8}}}

        async def call(path: str, body: dict[str, Any]) -> float:
            token, key = person.http.headers["authorization"], str(time.monotonic_ns())
            sent = time.perf_counter()
            async with http.post(
                f"{mesh.url}/api/v1/{path}", json=body, headers={"authorization": token, "idempotency-key": key}
            ) as response:
                said = await response.text()
            if response.status != HTTPStatus.OK:
                raise RuntimeError(said)
            return time.perf_counter() - sent

        async def submit(count: int, rate: float) -> list[float]:
            await person.sign_in()  # a token lives five minutes
            if not rate:
                sizes = [min(BATCH, count - done) for done in range(0, count, BATCH)]
                return [await call("tasks:batch", {"items": [item] * size}) for size in sizes]
            calls, began = [], time.perf_counter()
            for number in range(count):
                await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
                calls.append(asyncio.create_task(call("tasks", item)))
            return await asyncio.gather(*calls)

        async def submit_singly(count: int) -> None:
            await person.sign_in()
            free = asyncio.Semaphore(AT_A_TIME)

            async def one() -> None:
                async with free:
                    await call("tasks", item)

            await asyncio.gather(*(one() for _ in range(count)))

        try:
            yield Contestant(
                Figures(name),
                working,
                lambda count, rate: runner.run(submit(count, rate)),
                ended,
                lambda count: runner.run(submit_singly(count)),
            )
        finally:
            runner.run(holding.__aexit__(None, None, None))


@asynccontextmanager
async def customer(mesh: Mesh) -> AsyncIterator[tuple[Person, aiohttp.ClientSession, str]]:
    """Hold somebody whose quota is not what is measured, a client that costs little (httpx takes 3 ms), and a file."""
    async with registered(mesh.url) as person, aiohttp.ClientSession() as http:
        grant = {"login": person.username, "secret": mesh.secret("admin")}
        (await person.http.post(f"{mesh.url}/api/v1/users:grantAdmin", json=grant)).raise_for_status()

        async def unlimited() -> bool:
            await person.sign_in()
            answer = await person.http.post(f"users/{person.user_id}/quota:set", json={"tasks": str(10**9)})
            answer.raise_for_status()
            return True

        await eventually(unlimited, within_seconds=15)
        file = await person.http.post("files", params={"name": "a.jpg"}, content=photograph().read_bytes())
        yield person, http, file.json()["fileId"]


def peer(name: str, job: Job, environment: dict[str, str], ended: Callable[[], int]) -> Contestant:
    python = python_with("celery")
    children = WAITING_CHILDREN if job.waits else WORKERS
    threads = WAITING_THREADS if job.waits else THREADS
    worker = {
        "celery_peer": f"celery -A celery_peer worker -Q celery_peer -c {children} -l ERROR",
        "dramatiq_peer": f"dramatiq dramatiq_peer -p {WORKERS} -t {threads}",
    }[name].split()
    environment = {
        **os.environ,
        **environment,
        "PYTHONPATH": str(Path(__file__).parent),
        "dramatiq_queue_prefetch": str(8 * threads),
    }
    work = [str(job.seconds), "waiting" if job.waits else "busy"]

    def submit(count: int, rate: float) -> list[float]:
        command = [python, f"{Path(__file__).parent}/{name}.py", "submit", str(count), *work, str(rate)]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, timeout=600)
        taken: list[float] = json.loads(done.stdout)
        return taken

    working = partial(programs, [python.with_name(worker[0]), *worker[1:]], environment)
    return Contestant(Figures(f"{name.removesuffix('_peer').title()}, {job.name}"), working, submit, ended)


@contextmanager
def on_sqlite(folder: Path) -> Iterator[tuple[Mesh, Callable[[], int]]]:
    with (
        running(folder / "var", settings=UNLIMITED) as mesh,
        closing(sqlite3.connect(mesh.var / "data/task.db")) as sql,
    ):
        yield mesh, lambda: int(sql.execute(OURS_ENDED).fetchone()[0])


@contextmanager
def on_postgresql(folder: Path) -> Iterator[tuple[Mesh, Callable[[str, str], Callable[[], int]]]]:
    """Hold a mesh; yield it, and what makes counters of a query in a database."""
    with running(folder / "var", "--postgres", settings=UNLIMITED) as mesh, ExitStack() as stack:
        port, password = Layout.from_environment(mesh.environment).postgresql_port, mesh.secret("postgresql")
        with postgresql.connect(port, password) as admin:
            admin.execute("CREATE DATABASE peers")
        with postgresql.connect(port, password, "peers") as admin:
            admin.execute("CREATE TABLE dramatiq_done (name text PRIMARY KEY)")

        def counter(database: str, query: str) -> Callable[[], int]:
            sql = stack.enter_context(postgresql.connect(port, password, database))

            def count() -> int:
                with suppress(psycopg.errors.UndefinedTable):  # Celery makes its own, in time
                    return int(str(sql.execute(query).fetchone()[0]))
                return 0

            return count

        yield mesh, counter


def measure(folder: Path, job: Job, rounds: int, count: int) -> list[Figures]:
    name = f"Atelier, {job.name}"
    with on_sqlite(folder / "sqlite") as (mesh, ended), ours(mesh, f"{name}, SQLite", job, ended) as contestant:
        for _ in range(rounds):
            contestant.round(count)
        alone = contestant.figures
    with on_postgresql(folder / "postgresql") as (mesh, counter):
        layout = Layout.from_environment(mesh.environment)
        place = f"{postgresql.ADMIN}:{mesh.secret('postgresql')}@127.0.0.1:{layout.postgresql_port}/peers"
        environment = {
            "PEER_BROKER_URL": mesh_environment(layout, {}, mesh.secret("broker"))["ATELIER_BROKER_URL"],
            "PEER_DATABASE_URL": f"postgresql+psycopg://{place}",
            "PEER_DATABASE_DSN": f"postgresql://{place}",
        }
        with ours(mesh, f"{name}, PostgreSQL", job, counter("task", OURS_ENDED)) as through:
            contestants = [
                through,
                peer("celery_peer", job, environment, counter("peers", CELERY_ENDED)),
                peer("dramatiq_peer", job, environment, counter("peers", DRAMATIQ_ENDED)),
            ]
            for _ in range(rounds):
                for each in contestants:
                    each.round(count)
    return [*(each.figures for each in contestants), alone]


def main() -> None:
    options = arguments(__doc__ or "", rounds=5, tasks=5000)
    found: list[Figures] = []
    ratios: dict[str, list[float]] = {}
    for job in JOBS:
        folder = Path(tempfile.mkdtemp(prefix="atelier-"))
        folder.chmod(0o711)  # PostgreSQL runs as another user
        try:
            through, celery, dramatiq, alone = measure(folder, job, options.rounds, options.tasks)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        found += [through, celery, dramatiq, alone]
        ratios[f"celery, {job.name}"] = through.ratios("throughput", celery)
        ratios[f"dramatiq, {job.name}"] = through.ratios("throughput", dramatiq)
    tell(
        "Durable tasks",
        HOW.format(count=options.tasks, workers=WORKERS, children=WAITING_CHILDREN, threads=WAITING_THREADS),
        found,
        {"throughput": "tasks/s", "capacity": "tasks/s", "median_latency": "ms", "p99_latency": "ms"},
        ratios,
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
