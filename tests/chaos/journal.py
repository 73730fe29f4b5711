"""What a load asked for and what it was told."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Job:
    """One operation that a person asked for, under one idempotency key."""

    user_id: str
    key: str
    input_sha256: str
    operation: str
    input_faults: set[str] = field(default_factory=set)
    """The reasons for which it may fail for good."""
    task_ids: list[str] = field(default_factory=list)
    """What each call with the key was answered: one task."""
    refusal: str = ""
    """Why it was not accepted."""
    state: str = ""
    """How it ended, as the person was told."""
    failure: str = ""
    """Why it failed, if it did."""
    output_sha256: str = ""


@dataclass
class Journal:
    """A load's whole memory."""

    jobs: list[Job] = field(default_factory=list)
    requests: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Requests that were not answered as they should, by what came instead; each was made again."""
