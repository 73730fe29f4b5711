"""A storm: load and faults for a while, then rest, then the audit."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from scripts.local.layout import Layout
from tests.chaos.audit import Evidence, Findings, audited, collected
from tests.chaos.faults import Chaos, planned
from tests.chaos.journal import Journal
from tests.chaos.load import Load
from tests.eventually import eventually
from tests.installation import Mesh

HEAL_SECONDS = 120.0  # from the last fault until all runs and is well
REST_SECONDS = 60.0  # from the load's end until nothing is under way
END_SECONDS = 300.0  # from the last fault until everybody has what they asked for

Tell = Callable[[str], None]


@dataclass
class Report:
    """What happened and what is left."""

    journal: Journal
    faults: Counter[str]
    findings: Findings

    @property
    def accepted(self) -> int:
        return sum(bool(job.task_ids) for job in self.journal.jobs)


async def storm(mesh: Mesh, *, seed: int, seconds: float, people: int, tell: Tell, patient: bool = False) -> Report:
    """Let a storm pass over a running mesh and audit what it leaves.

    Args:
        mesh: which may have been used before.
        seed: of the faults.
        seconds: how long things die.
        people: how many work at a time.
        tell: is told of each step.
        patient: wait, too, for what is put right only after some minutes.

    Raises:
        TimeoutError: not everybody got an answer for good, or not everything came back.
    """
    chaos = Chaos(Layout.from_environment(mesh.environment), seed=seed)
    journal, faults, began = Journal(), Counter[str](), time.monotonic()
    load = Load(mesh.url, journal, people=people, seed=seed)
    working = asyncio.create_task(load.run())
    try:
        for fault in planned(seed):
            await asyncio.wait([working], timeout=fault.after_seconds)
            if working.done() or time.monotonic() - began > seconds:
                break
            if chaos.do(fault):
                faults[str(fault)] += 1
                tell(f"{time.monotonic() - began:6.1f} s  {fault}  ({len(journal.jobs)} jobs so far)")
        await chaos.settled()
        load.stop.set()
        tell(f"{time.monotonic() - began:6.1f} s  the storm is over; waiting until everybody has an answer")
        async with asyncio.timeout(END_SECONDS):
            await working
    finally:
        working.cancel()
    tell(f"{time.monotonic() - began:6.1f} s  everybody has an answer; waiting for rest")
    await eventually(lambda: mesh.script("status").returncode == 0, within_seconds=HEAL_SECONDS)
    findings = audited(await at_rest(mesh), journal.jobs)
    while patient and findings.pending and not findings.wrong:
        tell(f"{time.monotonic() - began:6.1f} s  {len(findings.pending)} things are still to be put right")
        await asyncio.sleep(15)
        findings = audited(await at_rest(mesh), journal.jobs)
    return Report(journal, faults, findings)


async def at_rest(mesh: Mesh) -> Evidence:
    """Return what a mesh keeps once nothing is under way, or after a while what still is."""
    deadline = time.monotonic() + REST_SECONDS
    while True:
        evidence = await collected(Layout.from_environment(mesh.environment), mesh.environment)
        if not evidence.moving or time.monotonic() > deadline:
            return evidence
        await asyncio.sleep(1)
