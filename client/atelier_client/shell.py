"""What the commands share: how they connect, answer, complain and end."""

from __future__ import annotations

import asyncio
import difflib
import json
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import click
from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console, RenderableType
from rich.table import Table

from atelier_client.client import Atelier
from atelier_client.credentials import FileCredentials
from atelier_client.errors import AtelierError, NotSignedIn, Unreachable
from atelier_client.server import Server

DEFAULT_LIMIT = 50
OK, FAILED, USAGE, NOT_SIGNED_IN, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 4, 130
DEFAULT_SERVER = "http://127.0.0.1:8080"

P = ParamSpec("P")

# What a person does next, by the reason of a refusal.
_NEXT = {
    "ACCOUNT_DISABLED": "An administrator can enable it: atelier admin set-role USER_ID --status active",
    "CREDENTIALS_INVALID": "Check name and password; atelier register makes a new account.",
    "EMAIL_TAKEN": "Do you have an account? atelier login",
    "FILE_NOT_FOUND": "atelier files lists yours.",
    "NOT_SIGNED_IN": "Sign in: atelier login, or make an account: atelier register",
    "QUOTA_EXCEEDED": "atelier quota shows what is used.",
    "ROLE_REQUIRED": "An administrator can give you the role: atelier admin set-role USER_ID --role admin",
    "SERVER_UNREACHABLE": "atelier doctor finds out why; --server or ATELIER_SERVER names another one.",
    "TASK_ENDED": "atelier tasks show ID tells how.",
    "TASK_NOT_FOUND": "atelier tasks lists yours.",
    "TASK_NOT_RETRYABLE": "Only a failed or cancelled task can be tried again.",
    "TASK_RETRIED_TOO_OFTEN": "atelier run starts a new one.",
    "WEBHOOK_DELIVERY_NOT_FOUND": "atelier webhook deliveries lists yours.",
    "WEBHOOK_NOT_FOUND": "Name a URL: atelier webhook set URL",
    "USERNAME_TAKEN": "Choose another name, or sign in: atelier login",
}


@dataclass
class Shell:
    """What the global options say, and where answers go."""

    url: str = field(default_factory=lambda: os.environ.get("ATELIER_SERVER") or DEFAULT_SERVER)
    json: bool = False
    # A table's row is as long as it is: a terminal wraps it, but an id that was cut short is good for nothing.
    out: Console = field(default_factory=lambda: Console(file=sys.stdout, width=_UNBOUNDED, highlight=False))
    err: Console = field(default_factory=lambda: _console(sys.stderr))

    @property
    def server(self) -> Server:
        try:
            return Server.parse(self.url)
        except ValueError as error:
            raise click.UsageError(str(error)) from error

    @property
    def credentials(self) -> FileCredentials:
        return FileCredentials(self.server.url)

    def connected(self) -> AbstractAsyncContextManager[Atelier]:
        return Atelier.connect(self.server.url, credentials=self.credentials)

    def answer(self, document: dict[str, Any], text: RenderableType) -> None:
        """Print the result of the command, for a program or for a person."""
        if self.json:
            click.echo(json.dumps(document, indent=2, ensure_ascii=False))
        else:
            self.out.print(text, markup=False, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Tell a person, beside the result, what goes on."""
        if not self.json:
            self.err.print(text, markup=False, highlight=False, soft_wrap=True)

    def complain(self, error: AtelierError) -> None:
        notes = getattr(error, "__notes__", [])
        if self.json:
            found = error.to_json() | ({"notes": notes} if notes else {})
            click.echo(json.dumps(found, ensure_ascii=False), err=True)
            return
        request = (
            f"; request {error.request_id}" if error.code in ("INTERNAL", "UNAVAILABLE") and error.request_id else ""
        )
        self.say(f"atelier: {error.message} ({error.reason}{request})")
        hint = _NEXT["NOT_SIGNED_IN"] if isinstance(error, NotSignedIn) else _NEXT.get(error.reason)
        if error.metadata.get("metric") == "storage_bytes":
            hint = f"{hint} atelier files delete ID makes room."
        if hint is None and error.retry_after_seconds:
            hint = f"Try again in {error.retry_after_seconds:.0f} s."
        for line in (hint, *notes):
            if line:
                self.say(line)


class Interrupted(AtelierError):
    code = "CANCELLED"

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message, reason="INTERRUPTED", metadata=metadata)


def exit_code(error: AtelierError) -> int:
    if isinstance(error, NotSignedIn):
        return NOT_SIGNED_IN
    if isinstance(error, Interrupted):
        return INTERRUPTED
    return UNREACHABLE if isinstance(error, Unreachable) else FAILED


class Command(click.Command):
    """A command that takes the global options, too: people write them last as often as first."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += global_options()


class Group(click.Group):
    """A group of such commands, which takes them, too, and guesses what a mistyped one was meant to be."""

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += global_options()

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if meant := difflib.get_close_matches(args[0], self.list_commands(ctx), n=1):
                raise click.UsageError(f"{error.message} Did you mean {meant[0]}?", ctx) from error
            raise


Group.group_class = Group


limit_option = click.option(
    "--limit", type=click.IntRange(1), default=DEFAULT_LIMIT, show_default=True, help="Most to list."
)


def global_options() -> list[click.Parameter]:
    def keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value:  # given here; a subcommand's silence does not undo it
            setattr(ctx.ensure_object(Shell), str(parameter.name), value)

    return [
        click.Option(
            ["--server", "url"],
            metavar="URL",
            expose_value=False,
            callback=keep,
            is_eager=True,
            help=f"Where Atelier is; default {DEFAULT_SERVER}, or what ATELIER_SERVER says.",
        ),
        click.Option(
            ["--json"],
            is_flag=True,
            expose_value=False,
            callback=keep,
            is_eager=True,
            help="Print one JSON document; errors as JSON on standard error.",
        ),
    ]


def connected(function: Callable[Concatenate[Shell, Atelier, P], Awaitable[None]]) -> Callable[P, None]:
    """Make a command of a coroutine that needs a connection."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        shell = click.get_current_context().ensure_object(Shell)

        async def main() -> None:
            async with shell.connected() as atelier:
                await function(shell, atelier, *args, **kwargs)

        asyncio.run(main())

    return run


def document(message: Message) -> dict[str, Any]:
    """Return `message` in the JSON that the server speaks: zero values present."""
    return json_format.MessageToDict(message, always_print_fields_with_no_presence=True)


def table(*columns: str) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, no_wrap=True, overflow="ignore")
    return made


def size(size_bytes: float) -> str:
    """Return 1536 as `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def local_time(stamp: Timestamp) -> str:
    if not stamp.seconds:
        return ""
    return datetime.fromtimestamp(stamp.seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


_UNBOUNDED = 10_000  # columns


def _console(stream: Any) -> Console:
    return Console(file=stream, width=None if stream.isatty() else _UNBOUNDED, highlight=False)
