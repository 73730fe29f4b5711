"""Child processes of a worker, and of the media service, any of which may die of its work.

Slots: each a folder and a process that does one operation at a time. And of a worker one process that has the models.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import pickle
import secrets
import shutil
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from mesh.errors import BY_CODE_NUMBER, Internal
from services.media.config import Config, WorkerConfig
from services.media.domain import (
    MAX_RESULTS,
    Format,
    Job,
    OutOfMemory,
    TimeLimitExceeded,
    Work,
    WorkerCrashed,
    Written,
    result_path,
)

ENCODER = f"libvips {metadata.version('pyvips-binary')}"
"""What reads and writes pixels, with the codecs that come in the same package; another one makes other bytes."""
# Those of the machine, and fontconfig's rules for choosing among them. A child has neither a home nor settings that
# would lead it to more.
FONT_FOLDERS = (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), Path("/etc/fonts"))
JOBS_PER_PROCESS = 500  # then a fresh one: whatever libraries leak is bounded

# All that the child needs; the broker's password and the rest of our environment are none of its business.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")

log = logging.getLogger(__name__)


class Slot:
    """Room for one task: `folder` is its own, there from `make_folder` until `clear`."""

    def __init__(
        self,
        folder: Path,
        inference: Inference | None = None,
        *,
        memory_bytes: int,
        weights_dir: Path | None = None,
        seconds: Callable[[], int],
        turns: asyncio.Semaphore,
    ) -> None:
        self._root = folder
        self.folder = folder / "task"
        self.inference = inference
        self._seconds = seconds
        self._turns = turns
        self._arguments = (str(memory_bytes), inference.address if inference else "", str(weights_dir or ""))
        self._process: Process | None = None
        self._jobs = 0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> Process:
        """Return the child, started when there is none."""
        temporary = self._root / "temporary"
        temporary.mkdir(parents=True, exist_ok=True)
        if self._process is None:
            self._process = await _begun(
                "services.media.worker.child",
                *self._arguments,
                stdin=PIPE,
                stdout=PIPE,
                env={"TMPDIR": str(temporary), "XDG_CACHE_HOME": str(self._root / "cache"), "VIPS_WARNING": "0"},
            )
            self._jobs = 0
        return self._process

    async def run(
        self, operation: Work, source: Path, files: dict[str, Path], folder: Path, told: Callable[[float], None]
    ) -> Sequence[Written]:
        """Do an operation in the child, when a core is free. Cancelling kills the child; the next job gets a new one.

        Args:
            operation: what to do.
            source: the input.
            files: what else the operation names, by file id.
            folder: where the results go.
            told: takes the share that is done, 0..1.

        Raises:
            MeshError: the operation's refusal, as `services.media.operations.run` has it.
            TimeLimitExceeded: it took too long.
            WorkerCrashed: the child died.
        """
        async with self._turns:
            return await self._run((operation, source, files, folder), told)

    async def _run(self, job: Job, told: Callable[[float], None]) -> Sequence[Written]:
        process, seconds = await self.start(), self._seconds()
        assert process.stdin is not None  # noqa: S101 - started with pipes
        assert process.stdout is not None  # noqa: S101 - likewise
        self._jobs += 1
        alive = False
        try:
            with contextlib.suppress(ConnectionError):  # it died: read what it said, and how
                process.stdin.write(pickle.dumps((seconds, job)))
                await process.stdin.drain()
            while line := await process.stdout.readline():
                message = json.loads(line)
                if "progress" in message:
                    told(message["progress"])
                    continue
                alive = self._jobs < JOBS_PER_PROCESS and not _out_of_memory(message)
                return _outcome(message, job[-1])
            raise _death(await process.wait(), seconds)
        finally:
            if not alive:
                await self.stop()

    async def stop(self) -> None:
        """End the child now; it holds nothing that the folders do not."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def make_folder(self) -> None:
        """Make `folder`, before a task and not after the one before it: a full disk is the next task's failure only."""
        self.folder.mkdir(parents=True, exist_ok=True)

    async def clear(self) -> None:
        """Remove what a task left behind."""
        await asyncio.to_thread(_remove, self.folder, self._root / "temporary")


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


class Inference:
    """The process that has the models. It begins when it is first asked, and again after it ended.

    Its socket is the worker's: whoever asks while there is no process waits for the next one.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._listening = socket.socket(socket.AF_UNIX)
        self.address = f"atelier/{secrets.token_hex(16)}"
        self._listening.bind(f"\0{self.address}")  # no file that a killed worker would leave behind
        self._listening.setblocking(False)
        self._listening.listen(128)
        self.process: Process | None = None

    async def run(self) -> None:
        """Keep it there while it is wanted; when cancelled, end it."""
        try:
            while True:
                await self._asked()
                try:
                    self.process = await self._begun()
                    status = await self.process.wait()
                except OSError:  # the machine has no room for a process; soon it may have
                    log.exception("models could not begin")
                    status = 1
                log.log(logging.WARNING if status else logging.INFO, "models ended", extra={"status": status})
                if status:
                    self._turn_away()
        finally:
            if self.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()
                await self.process.wait()
            self._listening.close()

    async def _begun(self) -> Process:
        settings = {
            "memory_bytes": self._config.model_memory_bytes,
            "batch": self._config.model_batch,
            "batch_seconds": self._config.model_batch_seconds,
            "compute_seconds": self._config.job_seconds,
        }
        return await _begun(
            "services.media.worker.inference",
            str(self._listening.fileno()),
            str(self._config.weights_dir),
            json.dumps(settings),
            pass_fds=[self._listening.fileno()],
        )

    async def _asked(self) -> None:
        asked, loop = asyncio.Event(), asyncio.get_running_loop()
        loop.add_reader(self._listening, asked.set)
        try:
            await asked.wait()
        finally:
            loop.remove_reader(self._listening)

    def _turn_away(self) -> None:
        """Have those who wait fail, as those did whom the process answered last: it may be the weights."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._listening.accept()[0].close()


def fonts(folders: Iterable[Path] = FONT_FOLDERS) -> str:
    """Return what stands for the fonts that are installed: with others a text has other letters, or boxes.

    Their files' names and sizes: libvips brings fontconfig as a library, not the program that lists them.
    """
    found = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    files = sorted((path.name, path.stat().st_size) for path in found)
    return f"fonts {hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}"


async def face_detector() -> str:
    """Return what `operations.faces` finds them with; empty where it is not installed, or does not work.

    A child tries it: the worker itself has no use for OpenCV and its 47 MiB.
    """
    packages = sorted({*metadata.packages_distributions().get("cv2", ())})
    if not packages:
        return ""
    trying = await _begun("services.media.worker.faces", stderr=PIPE)
    _, said = await trying.communicate()
    if trying.returncode:
        log.warning("OpenCV is installed and does not work", extra={"failure": said.decode(errors="replace")[-1000:]})
        return ""
    return " ".join(f"{each} {metadata.version(each)}" for each in packages)


async def _begun(module: str, *arguments: str, env: Mapping[str, str] | None = None, **options: Any) -> Process:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        start_new_session=True,  # Ctrl-C and a supervisor's signals are for the worker, which decides
        env=environment | dict(env or {}),
        **options,
    )


def _out_of_memory(message: dict[str, list[object]]) -> bool:
    """Tell whether a child met its limit: what its libraries make of that is known of none of them."""
    return message.get("refused", [])[1:2] == [OutOfMemory.reason]


def _death(status: int, seconds: int) -> TimeLimitExceeded | WorkerCrashed:
    if status == -signal.SIGALRM:
        return TimeLimitExceeded(f"The operation takes longer than {seconds} s.", metadata={"seconds": str(seconds)})
    return WorkerCrashed("The process that worked on the image died.", metadata={"status": str(status)})


def _outcome(message: dict[str, list[Any]], folder: Path) -> Sequence[Written]:
    match message:
        case {"written": [_, *_] as results} if len(results) <= MAX_RESULTS:
            return [_written(each, index, folder) for index, each in enumerate(results)]
        case {"refused": [int(code), str(reason), str(text)]}:
            refusal = BY_CODE_NUMBER.get(code, Internal)(text)
            refusal.reason = reason
            raise refusal
        case _:
            raise RuntimeError(f"a child process failed: {message.get('crashed', message)}")


def _written(result: list[Any], index: int, folder: Path) -> Written:
    # Where a result lies is worked out here: what the child says is believed no further than it must be.
    name, width, height = result
    format_ = Format[name]
    return Written(result_path(folder, index, format_), format_, int(width), int(height))


@asynccontextmanager
async def opened(config: Config | WorkerConfig) -> AsyncIterator[list[Slot]]:
    """Hold the slots of a process; what a killed one of the same name left behind is removed."""
    root = config.data_dir / config.service / config.instance
    await asyncio.to_thread(shutil.rmtree, root, ignore_errors=True)
    # Renders need no models.
    inference = Inference(config) if isinstance(config, WorkerConfig) else None
    turns = asyncio.Semaphore(os.cpu_count() or 1)  # more would only take longer each, and each has its time limit
    slots = [
        Slot(
            root / str(number),
            inference,
            memory_bytes=config.job_memory_bytes,
            weights_dir=config.weights_dir if isinstance(config, WorkerConfig) else None,
            seconds=lambda: config.job_seconds,
            turns=turns,
        )
        for number in range(config.slots)
    ]
    keeping = asyncio.create_task(inference.run()) if inference else None
    try:
        for slot in slots:
            await slot.start()
        yield slots
    finally:
        for slot in slots:
            await slot.stop()
        if keeping:
            keeping.cancel()
            await asyncio.wait([keeping])
        await asyncio.to_thread(shutil.rmtree, root, ignore_errors=True)
