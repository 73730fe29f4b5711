"""The commands that do the work: `run`, `tasks`, `files`."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
from atelier.media.v1.media_pb2 import Operation, RenderFileRequest
from atelier.storage.v1.storage_pb2 import File
from atelier.task.v1.task_pb2 import DeadLetter, RedriveTasksResponse, ReplayTasksResponse, Task, TaskBatch
from google.protobuf.descriptor import FieldDescriptor
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from atelier_client import client, operations
from atelier_client.client import Atelier, patiently
from atelier_client.comments import installed as comments
from atelier_client.errors import AtelierError, TaskNotDone, TasksNotDone
from atelier_client.shell import (
    FAILED,
    Command,
    Group,
    Interrupted,
    Shell,
    connected,
    document,
    limit_option,
    local_time,
    size,
    table,
)

STATES = {name.removeprefix("STATE_").lower(): number for name, number in Task.State.items() if number}
BATCH = "bat_"  # how the ids of batches begin
MOST_AT_ONCE = 1000  # files of one batch
STANDARD = "-"  # standard output, as a file's name


class Steps:
    """Shows on standard error what goes on: a bar on a terminal, else a line a step; nothing for programs."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self._shown = ""
        self._bar = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=shell.err,
            transient=True,
            disable=shell.json or not shell.err.is_terminal,
        )
        self._row = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, step: str, fraction: float | None) -> None:
        """Show a step and how far it is; None when that cannot be known."""
        if self._bar.disable and step != self._shown:
            self.shell.say(step)
        self._shown = step
        self._bar.update(self._row, description=step, total=None if fraction is None else 1.0, completed=fraction or 0)
        self._bar.start()  # changes nothing from the second time on

    def show_batch(self, batch: TaskBatch) -> None:
        counts = batch.state_counts
        ended = counts.succeeded + counts.failed + counts.cancelled
        self.show(f"{ended} of {batch.task_count} done", batch.fraction)

    def show_task(self, task: Task) -> None:
        if task.state == Task.STATE_QUEUED:
            self.show("queued", None)
        elif task.state == Task.STATE_RUNNING:
            self.show(f"running: {task.progress.stage}", task.progress.fraction)


def _runner(kind: FieldDescriptor) -> click.Command:
    """Return the command that runs one kind of operation."""
    known = list(operations.parameters(kind.message_type))

    @connected
    async def run_kind(
        shell: Shell,
        atelier: Atelier,
        /,
        *,
        sources: tuple[str, ...],
        output: str | None,
        detach: bool,
        deadline: float | None,
        webhook: str,
        **values: Any,
    ) -> None:
        limit = None if deadline is None else timedelta(seconds=deadline)
        if webhook and not detach:
            raise click.UsageError("--webhook goes with --detach: who waits hears of the end here.")
        named = Path(output) if output and output != STANDARD and len(sources) == 1 else None  # a file of a format
        if len(sources) > 1:
            _require_folder(sources, output, detach)
        else:
            _require_output(output, detach)
            values = _with_format(known, values, named)
        marks = {parameter.name: values[parameter.name] for parameter in known if parameter.bounds.file}
        marks = {name: mark for name, mark in marks.items() if mark}
        inputs = (*sources, *marks.values())
        for path in inputs:
            _require_source(path)
        operation = _built(kind, values, named)  # before anything is sent: it refuses what is incomplete
        _require_one_place(output, operation)
        written_to = None if detach else output
        _require_no_input(inputs, _places(written_to, sources, operation))
        with Steps(shell) as steps:
            sent = {name: (await _on_server(atelier, mark, steps)).file_id for name, mark in marks.items()}
            operation = _built(kind, {**values, **sent}, named)
            files = [await _on_server(atelier, source, steps) for source in sources]
            if len(files) > 1:
                # Once more, now that the names of files that the server had already are known.
                _require_no_input(inputs, _places(written_to, [file.name for file in files], operation))
                answer, text = await _many(
                    atelier, steps, files, operation, written_to, deadline=limit, webhook=webhook
                )
            elif written_to is None:
                task = await atelier.create_task(files[0].file_id, operation, deadline=limit, webhook_url=webhook)
                answer = {"task": document(task)}
                text = f"{task.task_id}\nFollow it with: atelier tasks watch {task.task_id}"
            else:
                result, paths, sizes = await _finished(atelier, steps, files[0], operation, written_to, deadline=limit)
                answer = {"task": document(result.task), "output": paths[0], "file": document(result.file)}
                if len(paths) > 1:
                    answer |= {"outputs": paths, "files": [document(each) for each in result.files]}
                text = "\n".join(
                    f"{'standard output' if path == STANDARD else path}: {size(size_bytes)}"
                    for path, size_bytes in zip(paths, sizes, strict=True)
                )
        # After the bar has gone, which would take the line with it.
        if output == STANDARD and not detach:
            shell.say(text)
        else:
            shell.answer(answer, text)
        if failed := answer.get("failed"):
            raise TasksNotDone(len(failed), len(files))

    return Command(
        operations.command_name(kind),
        params=[
            click.Argument(["sources"], metavar="FILE...", nargs=-1, required=True),
            *(parameter.option() for parameter in known),
            click.Option(
                ["-o", "--output"],
                metavar="PATH",
                help="Where the result goes; - is standard output. Its extension gives the format, or --format does. "
                "Of several files, the folder where the results go, by the files' names; it is made if missing. "
                "Several results are numbered: for small.webp they are small-1.webp and small-2.webp. "
                "A file that is there is replaced, but none that is worked on.",
            ),
            click.Option(
                ["--deadline"],
                metavar="SECONDS",
                type=click.FloatRange(1, 2_592_000),
                help="Fail the task unless it has ended so long after its creation.",
            ),
            click.Option(
                ["--webhook"],
                metavar="URL",
                default="",
                help="With --detach: what is told of the end, in place of what atelier webhook set names.",
            ),
            click.Option(["--detach"], is_flag=True, help="Do not wait: print the task's id, and what to type next."),
        ],
        callback=run_kind,
        help=f"{comments().get(kind.full_name, '')}\n\nFILE is a path, or the id (fil_…) of a file on the server. "
        "Several files are one batch: all are queued, or none.",
    )


async def _many(
    atelier: Atelier,
    steps: Steps,
    files: Sequence[File],
    operation: Operation,
    folder: str | None,
    *,
    deadline: timedelta | None,
    webhook: str,
) -> tuple[dict[str, Any], str]:
    """Run an operation on several files, fetch what was made into `folder`; None does not wait for it."""
    items = [(file, operation) for file in files]
    if folder is None:
        queued = [(file.file_id, operation) for file in files]
        batch = await atelier.create_task_batch(queued, deadline=deadline, webhook_url=webhook)
        text = f"{batch.batch_id}\nFollow it with: atelier tasks watch {batch.batch_id}"
        return {"batch": document(batch)}, text
    _require_names([file.name for file in files])
    await asyncio.to_thread(Path(folder).mkdir, exist_ok=True)
    batch = TaskBatch()

    def on_progress(newer: TaskBatch) -> None:
        nonlocal batch
        batch = newer
        steps.show_batch(batch)

    done, failed, lines = [], [], []
    try:
        with _told_where(lambda: f"atelier tasks --batch {batch.batch_id}" if batch.batch_id else ""):
            for file, task in zip(
                files, await atelier.run_batch(items, deadline=deadline, on_progress=on_progress), strict=True
            ):
                if task.state != Task.STATE_SUCCEEDED:
                    failed.append(document(task))
                    lines.append(f"{file.name}: {TaskNotDone(task).message}")
                    continue
                results = [await patiently(partial(atelier.file, file_id)) for file_id in task.output_file_ids]
                paths = _paths(str(Path(folder) / f"{Path(file.name).stem}{Path(results[0].name).suffix}"), results)
                for result, path in zip(results, paths, strict=True):
                    written = await _fetched(atelier, result, path, steps)
                    done.append({"task": document(task), "output": path, "file": document(result)})
                    lines.append(f"{path}: {size(written)}")
    except asyncio.CancelledError as interruption:
        text = (
            f"Interrupted; what was left of the batch {batch.batch_id} is cancelled."
            if batch.batch_id
            else "Interrupted."
        )
        raise Interrupted(text, batchId=batch.batch_id) from interruption
    return {"batch": document(batch), "done": done, "failed": failed}, "\n".join(lines)


@click.group(cls=Group)
def run() -> None:
    """Run an operation on one image or several, and fetch the results."""


for _kind in operations.KINDS:
    run.add_command(_runner(_kind))


def _built(kind: FieldDescriptor, values: Mapping[str, Any], named: Path | None) -> Operation:
    """Return the operation that the options' values say, each of several results in the format of the output's name."""
    operation = operations.build(kind, values)
    if named is not None:
        for result in operations.several(operation):
            result.format = result.format or operations.format_of(named) or 0
    return operation


def _with_format(known: list[operations.Parameter], values: Mapping[str, Any], named: Path | None) -> dict[str, Any]:
    """Return the options' values with the format that the output's name says, where none was given."""
    chosen = {each.path[0] for each in known if len(each.path) > 1 and values[each.name] not in (None, ())}
    lacking = [
        each.name
        for each in known
        if each.is_format
        and values[each.name] is None
        # Of several ways to end, e.g. a pipeline's, that which was chosen, or the one that needs nothing but a format.
        and (len(each.path) == 1 or each.path[0] in chosen or (not chosen and each.name == each.path[0].name))
    ]
    if named is None or not lacking:
        return dict(values)
    return {**values, **dict.fromkeys(lacking, operations.format_of(named))}


async def _finished(
    atelier: Atelier, steps: Steps, file: File, operation: Operation, output: str, *, deadline: timedelta | None
) -> tuple[client.Result, list[str], list[int]]:
    """Return what was made, where it is now, and how many bytes each file has."""
    task = Task()

    def on_progress(progress: client.Progress) -> None:
        nonlocal task
        task = progress.task or task
        steps.show_task(task)

    try:
        with _told_where(lambda: f"atelier tasks show {task.task_id}" if task.task_id else ""):
            result = await atelier.run(file, operation, deadline=deadline, on_progress=on_progress)
            paths = _paths(output, result.files)
            sizes = [await _fetched(atelier, *each, steps) for each in zip(result.files, paths, strict=True)]
    except asyncio.CancelledError as interruption:
        raise _interrupted(task) from interruption
    return result, paths, sizes


@contextmanager
def _told_where(command: Callable[[], str]) -> Iterator[None]:
    """Have a failure say, too, what shows the work that it broke off: it may be done, or go on."""
    try:
        yield
    except (AtelierError, OSError) as error:
        if shown_by := command():
            error.add_note(f"What became of the work: {shown_by}")
        raise


def _paths(output: str, files: Sequence[File]) -> list[str]:
    """Return where files go: one to `output`, several beside it, numbered, each with its own extension.

    Raises:
        click.UsageError: several on standard output.
    """
    if len(files) == 1:
        return [output]
    if output == STANDARD:
        ids = " ".join(file.file_id for file in files)
        raise click.UsageError(f"There are {len(files)} results, and standard output takes one: {ids}.")
    path = Path(output)
    return [str(path.with_name(f"{path.stem}-{n}{Path(file.name).suffix}")) for n, file in enumerate(files, 1)]


def _interrupted(task: Task) -> Interrupted:
    if task.state == Task.STATE_CANCELLED:
        return Interrupted(f"Interrupted; the task {task.task_id} is cancelled.", taskId=task.task_id)
    if task.state == Task.STATE_SUCCEEDED:
        return Interrupted(
            f"Interrupted; the task {task.task_id} was done already: atelier tasks show {task.task_id}",
            taskId=task.task_id,
        )
    if task.task_id:
        text = f"Interrupted, but the task {task.task_id} could not be cancelled: atelier tasks cancel {task.task_id}"
        return Interrupted(text, taskId=task.task_id)
    return Interrupted("Interrupted.")


def _require_output(output: str | None, detach: bool) -> None:
    """Refuse what would fail only after all the work."""
    if output is None:
        if not detach:
            raise click.UsageError("Say where the result goes: -o PATH (or -o - for standard output, or --detach).")
    elif output == STANDARD:
        if click.get_current_context().ensure_object(Shell).json:
            raise click.UsageError("--json and -o - both want standard output.")
        if sys.stdout.isatty():
            raise click.UsageError("The result is no text for a terminal; redirect it, or give -o PATH.")
    elif not Path(output).absolute().parent.is_dir():
        raise click.UsageError(f"There is no folder {Path(output).absolute().parent}.")
    elif Path(output).is_dir():
        raise click.UsageError(f"{output} is a folder; name a file in it.")


def _require_one_place(output: str | None, operation: Operation) -> None:
    """Refuse several results on standard output, where they can be counted before all the work."""
    if output == STANDARD and (count := len(list(operations.several(operation)))) > 1:
        raise click.UsageError(f"There will be {count} results, and standard output takes one: name a file with -o.")


def _require_folder(sources: Sequence[str], output: str | None, detach: bool) -> None:
    """Refuse what would fail only after all the work, of several files."""
    if len(sources) > MOST_AT_ONCE:
        raise click.UsageError(f"{len(sources):,} files are more than a batch may have, {MOST_AT_ONCE:,}.")
    if output is None and not detach:
        raise click.UsageError("Say where the results go: -o FOLDER (or --detach).")
    if output is not None:
        folder = Path(output)
        # It would be made; but small.webp was meant as a file.
        if output == STANDARD or (not folder.is_dir() and (folder.exists() or folder.suffix)):
            raise click.UsageError(f"{output} is not a folder; the results of several files go to one.")
        if not folder.absolute().parent.is_dir():
            raise click.UsageError(f"There is no folder {folder.absolute().parent}.")
        _require_names(sources)


def _require_names(names: Sequence[str]) -> None:
    """Refuse two files whose results would have one name."""
    stems = Counter(Path(name).stem for name in names)
    if same := [stem for stem, count in stems.items() if count > 1]:
        raise click.UsageError(f"The results of two files would have one name: {same[0]}.")


def _places(output: str | None, names: Sequence[str], operation: Operation) -> Iterator[Path]:
    """Yield every path at which a result may be written: see `_many` and `_paths`."""
    endings = operations.endings(operation)
    if output is None or output == STANDARD:
        return
    if len(names) > 1:
        yield from (Path(output) / f"{Path(name).stem}{ending}" for name in names for ending in endings)
    elif len(list(operations.several(operation))) > 1:
        yield from (Path(output).with_name(f"{Path(output).stem}{ending}") for ending in endings)
    else:
        yield Path(output)


def _require_no_input(inputs: Sequence[str], places: Iterable[Path]) -> None:
    """Refuse a place where a result would replace a file that is worked on."""
    taken = {_identity(Path(path)) for path in inputs if not _is_id(path)}
    for place in places:
        if place.exists() and _identity(place) in taken:  # also by another name: a link, or in other capitals on a Mac
            raise click.UsageError(
                f"A result may replace {place}, which is worked on; name another file or folder with -o."
            )


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _is_id(source: str) -> bool:
    return source.startswith("fil_") and not Path(source).exists()


def _require_source(source: str) -> None:
    if not _is_id(source) and not Path(source).is_file():
        raise click.UsageError(f"There is no file {source}.")


async def _on_server(atelier: Atelier, source: str, steps: Steps) -> File:
    """Return the server's file of that id, or send the one of that path."""
    if _is_id(source):
        return await patiently(partial(atelier.file, source))
    step, request_id = f"sending {Path(source).name}", secrets.token_hex(16)  # sent twice, it is one file
    steps.show(step, 0.0)

    def on_bytes(done: int, total: int) -> None:
        steps.show(step, done / total if total else None)

    return await patiently(lambda: atelier.upload(source, request_id=request_id, on_bytes=on_bytes))


async def _fetched(atelier: Atelier, file: File, output: str, steps: Steps) -> int:
    return await patiently(lambda: _written(partial(atelier.download, file.file_id), output, steps))


async def _written(fetched: Callable[..., Awaitable[int]], output: str, steps: Steps) -> int:
    """Write what `fetched` fetches to `output` once all is here, and return how many bytes."""

    def on_bytes(done: int, total: int) -> None:
        steps.show("receiving", done / total if total else None)

    if output != STANDARD:
        return await fetched(output, on_bytes=on_bytes)
    with tempfile.TemporaryFile() as whole:
        written = await fetched(whole, on_bytes=on_bytes)
        whole.seek(0)
        shutil.copyfileobj(whole, sys.stdout.buffer)
    sys.stdout.buffer.flush()
    return written


@click.group(cls=Group, invoke_without_command=True)
@click.option("--state", type=click.Choice(list(STATES)), help="Only tasks in this state.")
@click.option("--batch", metavar="BATCH_ID", default="", help="Only tasks of this batch.")
@limit_option
@click.pass_context
def tasks(context: click.Context, state: str | None, batch: str, limit: int) -> None:
    """List your tasks, newest first; or look at one."""
    if context.invoked_subcommand is None:
        context.invoke(_list_tasks, state=state, batch=batch, limit=limit)


@click.command()
@connected
async def _list_tasks(shell: Shell, atelier: Atelier, state: str | None, batch: str, limit: int) -> None:
    found: list[Task] = []
    async for task in atelier.tasks(STATES[state] if state else Task.STATE_UNSPECIFIED, batch_id=batch):
        found.append(task)
        if len(found) == limit:
            break
    rows = table("TASK", "STATE", "OPERATION", "PROGRESS", "CREATED", "RESULT")
    for task in found:
        rows.add_row(
            task.task_id, _state(task), _operation(task), f"{task.progress.fraction:.0%}",
            local_time(task.create_time), " ".join(task.output_file_ids) or task.error.reason,
        )  # fmt: skip
    shell.answer({"tasks": [document(task) for task in found]}, rows if found else "No tasks.")


@tasks.command()
@click.argument("task_id")
@connected
async def show(shell: Shell, atelier: Atelier, task_id: str) -> None:
    """Show a task and what happened to it."""
    task = await atelier.task(task_id)
    events = await atelier.task_events(task_id)
    lines = [_description(task), ""]
    for event in events:
        state = Task.State.Name(event.state).removeprefix("STATE_").lower()
        lines.append(f"{local_time(event.create_time)}  {state:<10} attempt {event.attempt}  {event.reason}".rstrip())
    shell.answer({"task": document(task), "events": [document(event) for event in events]}, "\n".join(lines))


@tasks.command()
@click.argument("task_id")
@connected
async def watch(shell: Shell, atelier: Atelier, task_id: str) -> None:
    """Follow a task, or a batch (bat_…), to its end: 1 unless all is done. Ctrl-C stops watching, not the task."""
    if task_id.startswith(BATCH):
        with Steps(shell) as steps:
            async for batch in atelier.watch_batch(task_id):
                steps.show_batch(batch)
        shell.answer({"batch": document(batch)}, _batch_description(batch))
        if not_done := batch.state_counts.failed + batch.state_counts.cancelled:
            raise TasksNotDone(not_done, batch.task_count)
        return
    task = Task()
    with Steps(shell) as steps:
        async for task in atelier.watch(task_id):
            steps.show_task(task)
    if task.state != Task.STATE_SUCCEEDED:
        raise TaskNotDone(task)
    shell.answer({"task": document(task)}, _description(task))


@tasks.command()
@click.argument("task_id")
@connected
async def cancel(shell: Shell, atelier: Atelier, task_id: str) -> None:
    """Cancel a task, or what has not ended of a batch (bat_…)."""
    if task_id.startswith(BATCH):
        batch = await atelier.cancel_task_batch(task_id)
        shell.answer({"batch": document(batch)}, _batch_description(batch))
        return
    task = await atelier.cancel_task(task_id)
    shell.answer({"task": document(task)}, f"{task.task_id} is {_state(task)}.")


@tasks.command()
@click.argument("task_id")
@connected
async def retry(shell: Shell, atelier: Atelier, task_id: str) -> None:
    """Queue a failed or cancelled task again."""
    task = await atelier.retry_task(task_id)
    text = f"{task.task_id} is {_state(task)}.\nFollow it with: atelier tasks watch {task.task_id}"
    shell.answer({"task": document(task)}, text)


@tasks.command()
@click.option("--reason", default="", help="Only those with this reason, e.g. WORKER_LOST.")
@limit_option
@connected
async def dead_letters(shell: Shell, atelier: Atelier, reason: str, limit: int) -> None:
    """List everybody's tasks that used up their attempts, oldest first. For administrators."""
    found: list[DeadLetter] = []
    async for letter in atelier.dead_letters(reason=reason):
        found.append(letter)
        if len(found) == limit:
            break
    rows = table("TASK", "USER", "REASON", "ATTEMPTS", "FAILED", "REQUEST", "TRACE")
    for letter in found:
        rows.add_row(
            letter.task_id, letter.user_id, letter.error.reason, str(letter.attempts), local_time(letter.dead_time),
            letter.request_id, letter.trace_id,
        )  # fmt: skip
    shell.answer({"deadLetters": [document(letter) for letter in found]}, rows if found else "No dead letters.")


@tasks.command()
@click.argument("task_ids", metavar="[TASK_ID]...", nargs=-1)
@click.option("--reason", default="", help="All with this reason, instead of those named.")
@connected
async def redrive(shell: Shell, atelier: Atelier, task_ids: tuple[str, ...], reason: str) -> None:
    """Queue tasks again that used up their attempts, for their owners. For administrators."""
    if bool(task_ids) == bool(reason):
        raise click.UsageError("Give either tasks or --reason.")
    redriven: list[str] = []
    refused: list[RedriveTasksResponse.Refusal] = []
    async for answer in atelier.redrive_tasks(task_ids, reason=reason):
        redriven += answer.task_ids
        refused += answer.refusals
    lines = [f"{len(redriven)} queued again."]
    lines += [f"{each.task_id}: {each.message} ({each.reason})" for each in refused]
    shell.answer({"taskIds": redriven, "refusals": [document(each) for each in refused]}, "\n".join(lines))
    if refused:
        raise TasksNotDone(len(refused), len(redriven) + len(refused))


@tasks.command()
@click.option("--rebuild", is_flag=True, help="Mend those that differ.")
@connected
async def replay(shell: Shell, atelier: Atelier, rebuild: bool) -> None:
    """Compare everybody's tasks with the log of their events, which rebuilds them. For administrators."""
    compared, incomplete, different = 0, 0, list[ReplayTasksResponse.Discrepancy]()
    async for page in atelier.replay_tasks(rebuild=rebuild):
        compared += page.replayed_count
        incomplete += page.incomplete_count
        different += page.discrepancies
    lines = [f"{each.task_id}: {', '.join(each.fields) or 'missing'}" for each in different]
    lines += [f"{compared:,} tasks compared with their events, {len(different):,} differ."]
    if incomplete:
        lines += [f"{incomplete:,} more have no events, or older ones without all facts, and were left alone."]
    if different:
        lines += ["They are now as their events say." if rebuild else "atelier tasks replay --rebuild mends them."]
    found = {"compared": compared, "incomplete": incomplete, "rebuilt": rebuild and bool(different)}
    shell.answer({**found, "discrepancies": [document(each) for each in different]}, "\n".join(lines))
    if different and not rebuild:
        raise SystemExit(FAILED)


@click.group(cls=Group, invoke_without_command=True)
@limit_option
@click.pass_context
def files(context: click.Context, limit: int) -> None:
    """List your files, newest first; or send, fetch or delete some."""
    if context.invoked_subcommand is None:
        context.invoke(_list_files, limit=limit)


@click.command()
@connected
async def _list_files(shell: Shell, atelier: Atelier, limit: int) -> None:
    found: list[File] = []
    async for file in atelier.files():
        found.append(file)
        if len(found) == limit:
            break
    rows = table("FILE", "SIZE", "TYPE", "CREATED", "NAME")
    for file in found:
        rows.add_row(file.file_id, size(file.size_bytes), file.content_type, local_time(file.create_time), file.name)
    shell.answer({"files": [document(file) for file in found]}, rows if found else "No files.")


@files.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False))
@click.option("--name", help="What to call it there; not given: as here.")
@connected
async def upload(shell: Shell, atelier: Atelier, path: str, name: str | None) -> None:
    """Send a file."""
    with Steps(shell) as steps:
        step = f"sending {Path(path).name}"
        file = await atelier.upload(
            path, name=name, on_bytes=lambda done, total: steps.show(step, done / total if total else None)
        )
    shell.answer({"file": document(file)}, f"{file.file_id}  {file.name}, {file.content_type}, {size(file.size_bytes)}")


@files.command()
@click.argument("file_id")
@click.option("-o", "--output", metavar="PATH", required=True, help="Where it goes; '-' is standard output.")
@connected
async def download(shell: Shell, atelier: Atelier, file_id: str, output: str) -> None:
    """Fetch a file."""
    _require_output(output, detach=False)
    with Steps(shell) as steps:
        file = await atelier.file(file_id)
        written = await _fetched(atelier, file, output, steps)
    if output != STANDARD:
        shell.answer({"output": output, "file": document(file)}, f"{output}: {size(written)}")


@files.command()
@click.argument("file_id")
@click.option("-o", "--output", metavar="PATH", required=True, help="Where it goes; '-' is standard output.")
@connected
async def render(shell: Shell, atelier: Atelier, /, file_id: str, output: str, **wanted: Any) -> None:
    """Fetch an image at another size."""
    _require_output(output, detach=False)
    if wanted["format"] is None and output != STANDARD:
        wanted["format"] = operations.format_called(Path(output))
    with Steps(shell) as steps:
        written = await _written(partial(atelier.render, file_id, **wanted), output, steps)
    if output != STANDARD:
        shell.answer({"output": output, "sizeBytes": str(written)}, f"{output}: {size(written)}")


render.params += [
    each.option() for each in operations.parameters(RenderFileRequest.DESCRIPTOR) if each.name != "file_id"
]


@files.command()
@click.argument("file_id")
@click.option("--render", metavar="QUERY", help="Of the image at another size, e.g. 'width=320&format=webp'.")
@click.option("--seconds", type=click.IntRange(1, 604_800), help="How long it is good for; not given: an hour.")
@connected
async def url(shell: Shell, atelier: Atelier, file_id: str, render: str | None, seconds: int | None) -> None:
    """Print a URL of a file that needs no token: whoever has it may read the file."""
    lifetime = None if seconds is None else timedelta(seconds=seconds)
    signed = await atelier.sign_url(file_id, render=render, lifetime=lifetime)
    shell.answer({"url": signed}, signed)


@files.command()
@click.argument("file_ids", metavar="FILE_ID...", nargs=-1, required=True)
@connected
async def delete(shell: Shell, atelier: Atelier, file_ids: tuple[str, ...]) -> None:
    """Delete files."""
    for file_id in file_ids:
        await atelier.delete_file(file_id)
    shell.answer({"deleted": list(file_ids)}, f"Deleted: {' '.join(file_ids)}")


def _state(task: Task) -> str:
    return Task.State.Name(task.state).removeprefix("STATE_").lower()


def _batch_description(batch: TaskBatch) -> str:
    counts = ", ".join(f"{count} {field.name}" for field, count in batch.state_counts.ListFields())
    return f"{batch.batch_id}: {counts}\nLook at its tasks with: atelier tasks --batch {batch.batch_id}"


def _operation(task: Task) -> str:
    return (task.operation.WhichOneof("kind") or "").replace("_", "-")


def _description(task: Task) -> str:
    """Return what a person wants to know of a task, and what they may type next."""
    lines = [f"{task.task_id}: {_operation(task)} of {task.input_file_id}, {_state(task)}, attempt {task.attempt}"]
    if task.state == Task.STATE_RUNNING:
        lines.append(f"{task.progress.stage}, {task.progress.fraction:.0%}")
    if task.HasField("error"):
        lines.append(f"{task.error.message} ({task.error.reason})")
        lines.append(f"Try it again with: atelier tasks retry {task.task_id}")
    lines += [f"Fetch the result with: atelier files download {each} -o PATH" for each in task.output_file_ids]
    return "\n".join(lines)
