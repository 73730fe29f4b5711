"""Points at which tests end a process on purpose, as kill -9 would: between two statements that belong together.

Nothing happens unless `ATELIER_CRASH_POINTS` names a folder that holds a file with the point's name. The first process
that gets there renames the file, so that a point ends one process once, and the test sees that it was reached.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

HIT = ".hit"  # what is appended to the name of a point that was reached
STATUS = 137  # what a shell says of a process that was killed by -9

_FOLDER = os.environ.get("ATELIER_CRASH_POINTS", "")


def point(name: str) -> None:
    """End this process here if a test wants that; all that it has not finished stays undone."""
    if not _FOLDER:
        return
    armed = Path(_FOLDER, name)
    with suppress(FileNotFoundError):
        armed.rename(armed.with_name(name + HIT))
        os._exit(STATUS)
