"""Files that are whole or not there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def written(path: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a file beside `path` that takes its place at the end, and is gone if anything fails.

    Args:
        path: a symbolic link is followed; what is no regular file, e.g. /dev/null, is written as it is.
        mode: permissions of a new file, less the umask.
    """
    if (
        path.exists() and not path.is_file()
    ):  # before links are followed: /dev/stdout may lead to a pipe, which has no path
        with path.open("wb") as file:
            yield file
        return
    path = path.resolve()
    beside = path.with_name(f".{secrets.token_hex(8)}.part")  # whatever the name's length
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
