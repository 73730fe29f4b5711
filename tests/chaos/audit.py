"""An audit of a mesh at rest: what its databases, its broker and its blobs say of one another and of a load's journal.

It shares no code with the services. `collected` reads, `audited` judges and is pure.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from scripts.local.install import rabbitmq_servers
from scripts.local.layout import SQLITE, Layout
from tests.chaos.journal import Job

Row = Mapping[str, Any]

TABLES = {
    "task": ("task", "task_event", "outbox"),
    "user": ("counter", "reservation", "ledger"),
    "storage": ("file", "debt"),
}
ENDS = {"SUCCEEDED": "settled", "FAILED": "released", "CANCELLED": "released"}
STEPS = {
    ("", "QUEUED"),
    ("QUEUED", "RUNNING"),
    ("QUEUED", "CANCELLED"),
    ("QUEUED", "FAILED"),
    ("RUNNING", "QUEUED"),
    ("RUNNING", "SUCCEEDED"),
    ("RUNNING", "FAILED"),
    ("RUNNING", "CANCELLED"),
    ("FAILED", "QUEUED"),
    ("CANCELLED", "QUEUED"),
}

# How long what a crash left half done may stand before the services put it right (services/*/upkeep.py, doubled).
HELD = timedelta(minutes=5)
UNFINISHED = timedelta(minutes=10)
UNCONFIRMED = timedelta(minutes=5)
UNKNOWN_BYTES = timedelta(minutes=5)  # with what tests.chaos tells the storage service


@dataclass(frozen=True)
class Blob:
    """A file in the blob folder; `age` since it was last written. `arriving` is one that has no name yet."""

    name: str
    arriving: bool
    sha256: str
    size_bytes: int
    age: timedelta


@dataclass(frozen=True)
class Evidence:
    """Everything that a mesh at rest keeps: rows by (database, table), messages by queue, blobs.

    `now` is in the databases' own unit, microseconds since 1970.
    """

    rows: Mapping[tuple[str, str], Sequence[Row]]
    queues: Mapping[str, int]
    blobs: Sequence[Blob]
    now: int

    @property
    def moving(self) -> bool:
        """Whether something is still under way."""
        unended = any(row["state"] not in ENDS for row in self.rows["task", "task"])
        return unended or bool(self.rows["task", "outbox"]) or any(self.queues.values())


@dataclass
class Findings:
    """What is wrong, and what is only not yet put right: the services look at that again later."""

    wrong: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)


async def collected(layout: Layout, environment: Mapping[str, str]) -> Evidence:
    """Read a mesh, which should be at rest."""
    rows: dict[tuple[str, str], Sequence[Row]] = {}
    for service, tables in TABLES.items():
        engine = create_async_engine(_database(layout, service))
        try:
            async with engine.connect() as connection:
                for table in tables:
                    result = await connection.execute(text(f'SELECT * FROM "{table}"'))
                    rows[service, table] = result.mappings().all()
        finally:
            await engine.dispose()
    folder = Path(environment.get("STORAGE_BLOBS_DIR", layout.data / "blobs"))
    now = await asyncio.to_thread(_seconds_of, folder)
    blobs = await asyncio.to_thread(lambda: list(_blobs(folder, now)))
    return Evidence(rows, await _queues(layout), blobs, int(now * 1_000_000))


def _database(layout: Layout, service: str) -> str:
    if layout.database == SQLITE:
        return f"sqlite+aiosqlite:///{layout.data}/{service}.db"
    password = (layout.secrets / "postgresql").read_text().strip()
    return f"postgresql+psycopg://postgres:{password}@127.0.0.1:{layout.postgresql_port}/{service}"


def audited(evidence: Evidence, journal: Sequence[Job]) -> Findings:
    """Compare everything with everything else."""
    findings = Findings()
    tasks = {row["task_id"]: row for row in evidence.rows["task", "task"]}
    _tasks(findings, evidence, tasks)
    _promises(findings, tasks, journal)
    _failures(findings, tasks, journal)
    _counters(findings, evidence)
    _reservations(findings, evidence, tasks)
    _files(findings, evidence, tasks)
    _blobs_known(findings, evidence)
    _stored(findings, evidence)
    _leftovers(findings, evidence)
    return findings


def _tasks(findings: Findings, evidence: Evidence, tasks: Mapping[str, Row]) -> None:
    """Each task has ended, once a round, by steps that there are."""
    histories: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(evidence.rows["task", "task_event"], key=lambda row: row["sequence"]):
        histories[row["task_id"]].append(row)
    for task_id in histories.keys() - tasks.keys():
        findings.wrong.append(f"{task_id}: has events and is no task")
    for task_id, task in tasks.items():
        events = histories[task_id]
        states = [event["state"] for event in events]
        if [event["sequence"] for event in events] != list(range(1, len(events) + 1)):
            findings.wrong.append(f"{task_id}: events are not numbered 1, 2, 3 …")
        for step in zip(["", *states], states, strict=False):
            if step not in STEPS:
                findings.wrong.append(f"{task_id}: went from {step[0] or 'nothing'} to {step[1]}")
        if not states or states[-1] != task["state"] or len(events) != task["sequence"]:
            findings.wrong.append(f"{task_id}: is {task['state']}, its events end with {states[-1:]}")
        if task["state"] not in ENDS:
            findings.wrong.append(f"{task_id}: has not ended, it is {task['state']}")
        claims = [event["attempt"] for event in events if event["state"] == "RUNNING"]
        if claims != list(range(1, len(claims) + 1)):
            findings.wrong.append(f"{task_id}: attempts {claims} are not 1, 2, 3 …")


def _promises(findings: Findings, tasks: Mapping[str, Row], journal: Sequence[Job]) -> None:
    """What a person was told is so: accepted tasks exist, one a key, and ended as was told."""
    for job in journal:
        if len(set(job.task_ids)) > 1:
            findings.wrong.append(f"the key {job.key} was answered with several tasks: {sorted(set(job.task_ids))}")
        for task_id in job.task_ids:
            task = tasks.get(task_id)
            if task is None:
                findings.wrong.append(f"{task_id}: was accepted and does not exist")
            elif job.state and task["state"] != job.state:
                findings.wrong.append(f"{task_id}: was told to be {job.state} and is {task['state']}")
    # Equal work has equal results: whoever did it, however often it was begun.
    results: dict[tuple[str, str], set[str]] = defaultdict(set)
    for job in journal:
        if job.output_sha256:
            results[job.input_sha256, job.operation].add(job.output_sha256)
    for (_, operation), contents in results.items():
        if len(contents) > 1:
            findings.wrong.append(f"{operation} of one input gave {len(contents)} different results")


def _failures(findings: Findings, tasks: Mapping[str, Row], journal: Sequence[Job]) -> None:
    """A task that failed has a faulty input, or is a dead letter, having used up its attempts."""
    for job in journal:
        for task in (tasks[task_id] for task_id in job.task_ids if task_id in tasks):
            reason = task["failure_reason"]
            if task["state"] == "FAILED" and not task["dead_time"] and reason not in job.input_faults:
                findings.wrong.append(f"{task['task_id']}: failed for good, with a sound input: {reason}")


def _counters(findings: Findings, evidence: Evidence) -> None:
    """Counters are the sum of the ledger, and of the reservations that stand."""
    counted = _sums(evidence.rows["user", "counter"])
    standing = Counter[tuple[str, ...]]()
    for row in evidence.rows["user", "reservation"]:
        column = {"held": "reserved", "bound": "reserved", "settled": "used"}.get(row["state"])
        if column:
            standing[row["user_id"], row["kind"], row["period"], column] += row["amount"]
    for name, other in (("ledger", _sums(evidence.rows["user", "ledger"])), ("reservations", standing)):
        for key in counted.keys() | other.keys():
            if counted[key] != other[key]:
                findings.wrong.append(f"quota {key}: the counter says {counted[key]}, the {name} say {other[key]}")


def _sums(rows: Sequence[Row]) -> Counter[tuple[str, ...]]:
    sums = Counter[tuple[str, ...]]()
    for row in rows:
        for column in ("used", "reserved"):
            sums[row["user_id"], row["kind"], row["period"], column] += row[column]
    return sums


def _reservations(findings: Findings, evidence: Evidence, tasks: Mapping[str, Row]) -> None:
    """Each round of each task is charged or refunded as it ended, and nothing is set aside for no task."""
    reserved = {row["reservation_id"]: row for row in evidence.rows["user", "reservation"] if row["kind"] == "tasks"}
    for task_id, task in tasks.items():
        for number in range(1, task["round"] + 1):
            # A round before the last one ended badly, or there would have been no retry.
            wanted = ENDS.get(task["state"]) if number == task["round"] else "released"
            reservation = reserved.pop(f"{task_id}/{number}", None)
            state = reservation["state"] if reservation else "missing"
            if state != wanted:
                findings.wrong.append(
                    f"{task_id}: is {task['state']}, its reservation {number} is {state}, not {wanted}"
                )
    for reservation_id, row in reserved.items():
        if row["state"] == "held":
            young = _age(evidence, row["update_time"]) < HELD
            _due(findings, young, f"{reservation_id}: is held for no task")
        elif row["state"] != "released":
            findings.wrong.append(f"{reservation_id}: is {row['state']} for no task")


def _files(findings: Findings, evidence: Evidence, tasks: Mapping[str, Row]) -> None:
    """Files have their bytes, and results belong to tasks that took them."""
    blobs = {blob.name: blob for blob in evidence.blobs if not blob.arriving}
    for row in evidence.rows["storage", "file"]:
        file_id, age = row["file_id"], _age(evidence, row["create_time"])
        blob = blobs.get(row["sha256"])
        if not row["ready"]:
            _due(findings, age < UNFINISHED, f"{file_id}: was begun and not finished")
        elif blob is None:
            findings.wrong.append(f"{file_id}: has no bytes")
        elif blob.size_bytes != row["size_bytes"]:
            findings.wrong.append(f"{file_id}: has {blob.size_bytes} bytes of {row['size_bytes']}")
        if row["task_id"] and row["ready"]:
            task = tasks.get(row["task_id"])
            taken = task is not None and file_id in _listed(task["output_file_ids"])
            if row["confirmed"] and not taken:
                findings.wrong.append(f"{file_id}: kept for {row['task_id']}, which did not take it")
            if not row["confirmed"]:
                _due(findings, age < UNCONFIRMED, f"{file_id}: neither taken nor refused by {row['task_id']}")


def _blobs_known(findings: Findings, evidence: Evidence) -> None:
    """Bytes are what their name says, and belong to a file."""
    known = {row["sha256"] for row in evidence.rows["storage", "file"]}
    for blob in evidence.blobs:
        if blob.arriving:
            _due(findings, blob.age < UNKNOWN_BYTES, f"blob {blob.name}: arrives for ever")
            continue
        if blob.name != blob.sha256:
            findings.wrong.append(f"blob {blob.name}: its content has another hash")
        if blob.name not in known:
            _due(findings, blob.age < UNKNOWN_BYTES, f"blob {blob.name}: belongs to no file")


def _stored(findings: Findings, evidence: Evidence) -> None:
    """Every file's bytes are charged, and nothing else is."""
    stored = {row["reservation_id"]: row for row in evidence.rows["user", "reservation"] if row["kind"] != "tasks"}
    owed = {row["file_id"] for row in evidence.rows["storage", "debt"]}
    findings.pending += [f"{file_id}: its quota is still to be given back" for file_id in owed]
    for row in evidence.rows["storage", "file"]:
        reservation = stored.pop(row["file_id"], None)
        if row["ready"] and (reservation is None or reservation["state"] != "settled"):
            state = reservation["state"] if reservation else "not reserved"
            findings.wrong.append(f"{row['file_id']}: its bytes are {state}, not charged")
    for file_id, reservation in stored.items():
        if reservation["state"] != "released" and file_id not in owed:
            findings.wrong.append(f"{file_id}: {reservation['amount']} bytes are {reservation['state']} for no file")


def _leftovers(findings: Findings, evidence: Evidence) -> None:
    """Nothing is under way."""
    waiting = len(evidence.rows["task", "outbox"])
    if waiting:
        findings.wrong.append(f"{waiting} messages have not left the outbox")
    findings.wrong += [f"queue {name}: {count} messages" for name, count in evidence.queues.items() if count]


def _due(findings: Findings, young: bool, what: str) -> None:
    (findings.pending if young else findings.wrong).append(what)


def _age(evidence: Evidence, time: int) -> timedelta:
    return timedelta(microseconds=evidence.now - time)


def _listed(value: Any) -> list[str]:
    return json.loads(value) if isinstance(value, str) else value


def _seconds_of(folder: Path) -> float:
    """Return the time by the clock that files are stamped with, seconds since 1970."""
    probe = folder.parent / "clock"
    probe.touch()
    return probe.stat().st_mtime


def _blobs(folder: Path, now: float) -> Iterator[Blob]:
    for path in folder.glob("*/*"):
        content = path.read_bytes()
        arriving = path.parent.name == "incoming"
        yield Blob(
            name=path.name if arriving else path.parent.name + path.name,
            arriving=arriving,
            sha256=hashlib.sha256(content).hexdigest(),
            size_bytes=len(content),
            age=timedelta(seconds=now - path.stat().st_mtime),
        )


async def _queues(layout: Layout) -> dict[str, int]:
    """Return what the broker itself says of its queues."""
    home = layout.var / "rabbitmq"
    environment = {
        "PATH": os.environ["PATH"],
        "LANG": "C.UTF-8",
        "HOME": str(home),
        "RABBITMQ_NODENAME": "atelier@localhost",
        "RABBITMQ_CONF_ENV_FILE": os.devnull,
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(layout.epmd_port),
    }
    command = Path(rabbitmq_servers()[-1]).with_name("rabbitmqctl")
    listing = await asyncio.create_subprocess_exec(
        command,
        *("list_queues", "--quiet", "--formatter", "json", "name", "messages"),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, complaint = await listing.communicate()
    if listing.returncode != 0:
        raise RuntimeError(f"the broker does not say what its queues hold: {complaint.decode()}")
    # Those of watches are of one connection each, and their messages nobody's promise.
    return {row["name"]: row["messages"] for row in json.loads(output) if not row["name"].startswith("amq.gen-")}
