"""Runs `scripts/chaos`: boots a mesh of its own, lets a storm pass over it, audits, tells."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.chaos.journal import Job
from tests.chaos.storm import Report, storm
from tests.installation import running

SETTINGS = {
    **{f"CONTROL_RATE_{kind}": "5000:5000" for kind in ("SIGN_IN", "READ", "WRITE", "BYTES")},
    "STORAGE_SWEEP_SECONDS": "20",
    "STORAGE_GRACE_SECONDS": "60",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000), help="of the faults")
    parser.add_argument("--seconds", type=float, default=60, help="how long things die (default 60)")
    parser.add_argument("--people", type=int, default=6, help="who work at a time (default 6)")
    parser.add_argument("--replicas", type=int, default=2, help="of every service (default 2)")
    parser.add_argument("--postgres", action="store_true", help="keep the data in PostgreSQL, which dies, too")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        Path(folder).chmod(0o711)  # PostgreSQL runs as another user
        say(f"Seed {options.seed}. Starting a mesh of its own, {options.replicas} of each …")
        database = ("--postgres",) if options.postgres else ()
        with running(Path(folder) / "var", *database, replicas=options.replicas, settings=SETTINGS) as mesh:
            report = asyncio.run(
                storm(mesh, seed=options.seed, seconds=options.seconds, people=options.people, tell=say, patient=True)
            )
    tell(report)
    return 1 if report.findings.wrong else 0


def say(line: str) -> None:
    print(line, flush=True)


def tell(report: Report) -> None:
    journal, findings = report.journal, report.findings
    ends = Counter(ended(job) for job in journal.jobs)
    say("")
    say(f"{report.faults.total()} faults: " + listed(report.faults))
    say(f"{report.accepted} tasks accepted: " + listed(ends))
    failed = journal.failures.total()
    say(f"{journal.requests} requests, {failed} not answered as they should be and made again:")
    for what, count in journal.failures.most_common():
        say(f"    {count:6} × {what}")
    for line in findings.pending:
        say(f"Not yet put right: {line}")
    for line in findings.wrong:
        say(f"WRONG: {line}")
    say("The audit found nothing wrong." if not findings.wrong else f"The audit found {len(findings.wrong)} faults.")


def ended(job: Job) -> str:
    if job.failure:
        return f"{job.state} ({job.failure})"
    return job.state or f"refused ({job.refusal})"


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} × {what}" for what, count in counts.most_common())


if __name__ == "__main__":
    sys.exit(main())
