"""What every child process of a worker gives up first."""

from __future__ import annotations

import ctypes
import os
import resource
import signal

PR_SET_PDEATHSIG = 1  # linux/prctl.h
NICE = 5  # the event loops that keep leases and answer health checks come first


def confine(memory_bytes: int | None) -> None:
    """Bound this process for good; without `memory_bytes` what it may allocate is bounded by whoever calls."""
    if memory_bytes is not None:
        # RLIMIT_DATA counts what is allocated; RLIMIT_AS would also count libraries and the stacks of idle threads.
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody waits for the answer of an orphan
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold somebody's picture
    os.nice(NICE)
