"""What a file is, the rules it obeys, and the ports to whatever keeps it. No I/O, no protobuf."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Protocol

from mesh.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    Unavailable,
)

MAX_NAME_LENGTH = 255
SWEEP = "sweep"  # the work that one replica does for all: the name of its lock and of its fence
HEAD_BYTES = 4096  # enough for every signature we know, and for the prologue of an SVG


class FileNotFound(NotFound):
    reason = "FILE_NOT_FOUND"


class FileEmpty(InvalidArgument):
    reason = "FILE_EMPTY"


class FileTooLarge(PayloadTooLarge):
    reason = "FILE_TOO_LARGE"


class FileNameMalformed(InvalidArgument):
    reason = "FILE_NAME_MALFORMED"


class ContentTypeMismatch(InvalidArgument):
    reason = "CONTENT_TYPE_MISMATCH"


class StorageFull(Unavailable):
    reason = "STORAGE_FULL"


class UploadUndone(Aborted):
    reason = "UPLOAD_UNDONE"


class ResultInUse(FailedPrecondition):
    reason = "RESULT_IN_USE"


@dataclass(frozen=True, slots=True)
class Origin:
    """How a result came about.

    `operation` is JSON in the one form of all that say the same. `name_ending` follows the input's name in the result's
    name, and `count` results belong together.
    """

    input_file_id: str
    input_sha256: str
    operation: str
    encoder: str
    model: str
    name_ending: str = ""
    count: int = 1


@dataclass(frozen=True, slots=True)
class Work:
    """What an attempt at a task makes: `key` is equal for equal work, whoever asks for it."""

    key: str
    task_id: str
    attempt: int
    user_id: str
    input_name: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file that is to be kept; its bytes have arrived. All from `task_id` on is of a result."""

    file_id: str
    user_id: str
    name: str
    content_type: str
    size_bytes: int
    sha256: str
    task_id: str | None = None
    attempt: int | None = None
    result_index: int = 0
    work: str | None = None
    origin: Origin | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class File(NewFile):
    """A file of a user.

    Until it is `ready` its bytes or its quota are not certain and nobody sees it. A result is `confirmed`
    once its task has taken it; uploads are from the start.
    """

    create_time: datetime
    ready: bool
    confirmed: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """What a user keeps."""

    file_count: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a task stands."""

    ended: bool
    attempt: int
    output_file_ids: Collection[str]


class Turn(Enum):
    """What an attempt is to do about its work."""

    MAKE = auto()
    WAIT = auto()
    TAKE = auto()


class Verdict(Enum):
    """What becomes of a result."""

    TAKEN = auto()
    REFUSED = auto()
    OPEN = auto()


class Incoming(Protocol):
    """Bytes that have arrived and are not kept yet."""

    @property
    def sha256(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def head(self) -> bytes:
        """The first `HEAD_BYTES`."""


class Blobs(Protocol):
    """Where bytes are kept, each content once, by its SHA-256."""

    def received(self, chunks: AsyncIterator[bytes], limit_bytes: int) -> AbstractAsyncContextManager[Incoming]:
        """Take in bytes; without `keep` they are gone at the end. Raises FileTooLarge, StorageFull."""

    async def keep(self, incoming: Incoming) -> None:
        """Make the bytes last. Raises StorageFull."""

    async def read(self, sha256: str, start: int, stop: int) -> AsyncGenerator[bytes]:
        """Open the bytes from `start` up to `stop`; what is open stays readable. Raises FileNotFound."""

    async def remove(self, sha256: str) -> None:
        """Remove the bytes, as one step that a cancelled caller cannot leave running behind it."""

    async def remove_leftovers(self, grace_seconds: float) -> None:
        """Remove what uploads left behind that ended with their process."""

    def older_than(self, grace_seconds: float) -> AsyncIterator[tuple[str, Sequence[str]]]:
        """Give, prefix by prefix, the SHA-256 of the contents that came before `grace_seconds` ago."""


class Files(Protocol):
    """Where it is known which files there are. Each method is one transaction; ages are by its own clock.

    Whatever takes a row away frees its request id, and leaves a debt in the same transaction: quota to give back.
    """

    async def begin(self, file: NewFile, request_id: str) -> File:
        """Store the row of `file`, not ready, or return that of an earlier call.

        The earlier call is the user's with this `request_id`, or for a result the one of its task, attempt and index.
        """

    async def finish(self, file_id: str) -> File | None:
        """Make a file ready; None when its row was taken away meanwhile."""

    async def undo(self, begun: File) -> bool:
        """Take away a row unless it is ready; say whether it is gone, and so a debt stands."""

    async def take(self, work: Work, lease_seconds: float) -> tuple[Turn, Sequence[File]]:
        """Begin files of the contents that equal work has made, or say who makes them.

        Whoever is to make them is so for `lease_seconds`, and again from each call on; after that it is the next one.
        """

    async def release(self, task_id: str, attempt: int) -> None:
        """Have another attempt make what this one was to make."""

    async def get(self, user_id: str, file_id: str) -> File:
        """Return a ready file. Raises FileNotFound."""

    async def some(self, user_id: str, file_ids: Collection[str]) -> Sequence[File]:
        """Return those of a user's confirmed files that are among these, in no order."""

    async def page(self, user_id: str, size: int, before: str | None) -> Sequence[File]:
        """Return at most `size` confirmed files, newest first, that are older than the id `before`."""

    async def usage(self, user_id: str) -> Usage:
        """Return what a user keeps."""

    async def delete(self, user_id: str, file_id: str, request_id: str) -> File | None:
        """Take a file away and return it; None when this very request has done so before. Raises FileNotFound."""

    async def results(self, task_id: str, attempt: int) -> Sequence[File]:
        """Return the files that an attempt wrote, ready or not."""

    async def confirm(self, task_id: str, file_id: str) -> None:
        """Note that a task took a result."""

    async def follow(self, results: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        """Note which tasks took which results, (task, file), by event; an event counts once."""

    async def refuse(self, file_id: str) -> bool:
        """Take a result away unless it is confirmed; say whether that was done, and so a debt stands."""

    async def stale(self, age_seconds: float) -> Sequence[File]:
        """Return files that are not ready though they began `age_seconds` ago; some, another time others."""

    async def unconfirmed(self, age_seconds: float) -> Sequence[File]:
        """Return ready results that wait for their task since `age_seconds`; some, another time others."""

    async def debts(self) -> Mapping[str, str | None]:
        """Return whose quota is not back yet, by the ids of files that are gone; some, another time others.

        None is of an earlier release, which did not note whose it was.
        """

    async def pay(self, file_id: str) -> None:
        """Note that a file's quota is back."""

    async def known_contents(self, prefix: str) -> Collection[str]:
        """Return every SHA-256 with `prefix` that a row has."""

    async def used(self, contents: Collection[str]) -> Collection[str]:
        """Return which of these SHA-256 a row has."""

    def unused(self, sha256: str, fence: int | None = None) -> AbstractAsyncContextManager[bool]:
        """Say whether no row has this content, and keep it so until the end; a sweep gives its fence."""

    async def forget(self, fence: int) -> None:
        """Remove request ids and event ids that are past their time; `fence` is of the work SWEEP."""


class Quota(Protocol):
    """The user service's account of bytes; a file's reservation has the file's id."""

    async def charge(self, file_id: str, user_id: str, size_bytes: int) -> None:
        """Count a file's bytes. Raises UploadUndone when they were released before, or the user service's refusal."""

    async def release(self, file_id: str, user_id: str | None) -> None:
        """Give a file's bytes back, for good: a charge that is still under way comes to nothing."""


class Tasks(Protocol):
    """The task service's word on tasks."""

    async def standing(self, task_id: str) -> Standing | None:
        """Return where a task stands; None when there is no such task."""


def undone() -> UploadUndone:
    return UploadUndone("Storing the file took too long and was given up; send it again.", retry_after_seconds=1)


def require_name(name: str) -> None:
    """Refuse a name that cannot be a file's name somewhere.

    Raises:
        FileNameMalformed: empty, too long, with a `/` or a control character, or `.` or `..`.
    """
    wrong = next((sign for sign in name if sign == "/" or unicodedata.category(sign) in {"Cc", "Cs", "Zl", "Zp"}), "")
    if not name or len(name) > MAX_NAME_LENGTH or wrong or name in {".", ".."}:
        raise FileNameMalformed(
            f"A file's name has 1 to {MAX_NAME_LENGTH} characters, no '/' and no control characters.",
            metadata={"max_length": str(MAX_NAME_LENGTH), "length": str(len(name)), "character": ascii(wrong)[1:-1]},
            violations={"name": f"1 to {MAX_NAME_LENGTH} characters, no '/', no control characters"},
        )


def require_size(size_bytes: int, limit_bytes: int) -> None:
    """Refuse a length that is too much. Raises FileTooLarge."""
    if size_bytes > limit_bytes:
        raise FileTooLarge(
            f"The file is too large: at most {limit_bytes} bytes are taken.",
            metadata={"limit_bytes": str(limit_bytes)},
        )


def require_not_empty(size_bytes: int) -> None:
    """Refuse nothing at all. Raises FileEmpty."""
    if size_bytes == 0:
        raise FileEmpty("The body is empty: send the file's bytes as the body.", metadata={"size_bytes": "0"})


def work_key(origin: Origin, contents: Sequence[str]) -> str:
    """Return the name of some work on files of these SHA-256, in their order."""
    parts = [origin.operation, origin.encoder, origin.model, *contents]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def named_after(input_name: str, ending: str) -> str:
    """Return the name of a result of the file `input_name`."""
    stem = input_name.rpartition(".")[0] or input_name
    return stem[: MAX_NAME_LENGTH - len(ending)] + ending


def complete(results: Iterable[File]) -> Sequence[File]:
    """Return the results of one attempt that has all of its own here, by index; none when there is no such one."""
    attempts: dict[tuple[str | None, int | None], dict[int, File]] = defaultdict(dict)
    for each in results:
        attempts[each.task_id, each.attempt][each.result_index] = each
    for found in attempts.values():
        files = [found[index] for index in sorted(found)]
        if files[0].origin is not None and len(files) == files[0].origin.count:
            return files
    return []


def fingerprint(file: NewFile) -> bytes:
    """Return what two uploads under one request id must have in common."""
    return hashlib.sha256(f"{file.sha256}/{file.name}".encode()).digest()


def verdict(file: File, standing: Standing | None) -> Verdict:
    """Return what becomes of a result, given where its task stands."""
    if standing is None:
        return Verdict.REFUSED
    if file.file_id in standing.output_file_ids:
        return Verdict.TAKEN
    if standing.ended or file.attempt is None or standing.attempt > file.attempt:
        return Verdict.REFUSED
    return Verdict.OPEN
