"""The process in which libvips meets other people's bytes: jobs on standard input, answers on standard output.

Jobs come pickled, from a parent that is trusted. Answers are JSON lines, never pickled: after a hostile image
nothing that this process says may be believed further than that.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesh.errors import MeshError
from services.media import operations
from services.media.domain import Job, OutOfMemory
from services.media.operations import models
from services.media.worker.confined import confine
from services.media.worker.models import RemoteModels
from services.media.worker.weights import described

PROGRESS_SECONDS = 0.1

Answer = Callable[[dict[str, Any]], None]


def main(memory_bytes: int, address: str, weights_dir: Path | None) -> None:
    confine(memory_bytes)
    models.use(RemoteModels(address, described(weights_dir)))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a codec prints is no answer

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers)

    while True:
        seconds: int
        job: Job
        try:
            seconds, job = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the parent, which started this process
        except EOFError:
            return
        # The kernel ends this process when the time is up, also when the code hangs in C.
        signal.alarm(seconds)
        _answer(job, answer)
        signal.alarm(0)


def _answer(job: Job, answer: Answer) -> None:
    try:
        results = operations.run(*job, _Progress(answer))
    except MeshError as refusal:
        answer({"refused": [refusal.code_number, refusal.reason, refusal.message]})
    except MemoryError:
        answer({"refused": [OutOfMemory.code_number, OutOfMemory.reason, "The operation needs more memory."]})
    except Exception:  # noqa: BLE001 - a bug: the worker logs it, and this process goes on
        answer({"crashed": traceback.format_exc()[-8000:]})
    else:
        answer({"written": [[each.format.name, each.width, each.height] for each in results]})


class _Progress:
    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._next = 0.0

    def __call__(self, share: float) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PROGRESS_SECONDS
            self._answer({"progress": share})


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]) if sys.argv[3] else None)
