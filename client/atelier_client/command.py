"""The `atelier` command: accounts, administration, doctor, and how every command ends. Work is in `work`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from atelier.user.v1.user_pb2 import AuditQuotasResponse, Quota, Reservation, User
from click.shell_completion import get_completion_class

from atelier_client import doctor as checks
from atelier_client import mesh, webhooks, work
from atelier_client.client import Atelier
from atelier_client.errors import AtelierError, InvalidArgument, Unreachable
from atelier_client.shell import (
    FAILED,
    OK,
    USAGE,
    Group,
    Interrupted,
    Shell,
    connected,
    document,
    exit_code,
    local_time,
    size,
    table,
)
from atelier_client.version import VERSION

ROLES = {"user": User.ROLE_USER, "vip": User.ROLE_VIP, "admin": User.ROLE_ADMIN}
STATUSES = {"active": User.STATUS_ACTIVE, "disabled": User.STATUS_DISABLED}

EPILOG = """\b
Exit codes: 0 done; 1 refused, or a task that was run or watched, alone or in
a batch, failed or was cancelled; 2 wrong usage; 3 not signed in; 4 the server
does not answer; 130 interrupted.

\b
Environment: ATELIER_SERVER (--server), NO_COLOR, ATELIER_DEBUG=1 (where an
error came from), XDG_CONFIG_HOME (credentials lie in its folder atelier)."""


@click.group(cls=Group, epilog=EPILOG)
@click.version_option(VERSION, prog_name="atelier", message="%(prog)s %(version)s")
def cli() -> None:
    """Work on images on an Atelier server.

    \b
    atelier register
    atelier run resize photo.jpg --width 800 -o small.webp
    """  # noqa: D301 - click's mark for lines to keep


cli.add_command(work.run)
cli.add_command(work.tasks)
cli.add_command(work.files)
cli.add_command(webhooks.webhook)
cli.add_command(mesh.mesh)


def _asked_option(name: str, label: str, help_text: str) -> Callable[..., Any]:
    """Make an option whose value is asked for when it is not given and there is someone to ask.

    Asked while options are read, not in the coroutine: there, Ctrl-C would wait for the answer.
    """

    def ask(ctx: click.Context, _option: click.Parameter, value: str | None) -> str | None:
        if value or ctx.resilient_parsing:
            return value
        if not sys.stdin.isatty():
            raise click.UsageError(f"Give --{name}: there is no terminal to ask for it.")
        return str(click.prompt(label, err=True))

    return click.option(f"--{name}", callback=ask, help=f"{help_text}; asked for when not given.")


def _password_option(*, confirm: bool) -> Callable[..., Any]:
    def ask(ctx: click.Context, _option: click.Parameter, from_stdin: bool) -> str | None:
        if ctx.resilient_parsing:
            return None
        if from_stdin:
            return sys.stdin.readline().rstrip("\r\n")
        if not sys.stdin.isatty():
            raise click.UsageError("Give --password-stdin and the password: there is no terminal to ask for it.")
        return str(click.prompt("Password", hide_input=True, confirmation_prompt=confirm, err=True))

    text = "Read the password from the first line of standard input; asked for when not given."
    return click.option("--password-stdin", "password", is_flag=True, callback=ask, help=text)


@cli.command()
@_asked_option("username", "Username", "3 to 32 letters, digits, '-', '_' or '.'")
@_asked_option("email", "Email", "Where you can be written to")
@_password_option(confirm=True)
@connected
async def register(shell: Shell, atelier: Atelier, username: str, email: str, password: str) -> None:
    """Make an account, and sign in."""
    await atelier.register(username, email, password)
    user = await atelier.login(username, password)
    shell.answer({"user": document(user)}, f"Welcome, {user.username}. You are signed in at {atelier.server.url}.")


@cli.command()
@_asked_option("username", "Username or email", "Username or email")
@_password_option(confirm=False)
@connected
async def login(shell: Shell, atelier: Atelier, username: str, password: str) -> None:
    """Sign in."""
    user = await atelier.login(username, password)
    shell.answer({"user": document(user)}, f"Signed in as {user.username} at {atelier.server.url}.")


@cli.command()
@click.option("--all", "all_sessions", is_flag=True, help="On every machine.")
@connected
async def logout(shell: Shell, atelier: Atelier, all_sessions: bool) -> None:
    """Sign out."""
    known = atelier.session()
    try:
        await atelier.logout(all_sessions=all_sessions)
    except Unreachable:
        shell.say("Signed out here. The server could not be told: there, the session ends by itself in 30 days.")
        raise
    text = f"Signed out at {atelier.server.url}." if known else f"You were not signed in at {atelier.server.url}."
    shell.answer({"signedOut": known is not None}, text)


@cli.command()
@connected
async def whoami(shell: Shell, atelier: Atelier) -> None:
    """Show who is signed in."""
    user = await atelier.me()
    role = User.Role.Name(user.role).removeprefix("ROLE_").lower()
    shell.answer(
        {"user": document(user)}, f"{user.username} <{user.email}>, {user.user_id}, {role}, at {atelier.server.url}"
    )


@cli.group(cls=Group, invoke_without_command=True)
@click.pass_context
def quota(context: click.Context) -> None:
    """Show what is used and left."""
    if context.invoked_subcommand is None:
        context.invoke(_own_quota)


@click.command()
@connected
async def _own_quota(shell: Shell, atelier: Atelier) -> None:
    _show_quota(shell, await atelier.quota())


@quota.command()
@connected
async def audit(shell: Shell, atelier: Atelier) -> None:
    """Prove that everybody's quotas are counted right. For administrators."""
    compared, drifts, disputes = 0, list[AuditQuotasResponse.Drift](), list[AuditQuotasResponse.Dispute]()
    async for page in atelier.audit_quotas():
        compared += page.reservation_count
        drifts += page.drifts
        disputes += page.disputes
    lines = [
        f"{each.user_id}, {each.metric} {each.period}".rstrip()
        + f": counted {_amounts(each.counter)}, ledger {_amounts(each.ledger)}, "
        f"reservations {_amounts(each.reservations)}"
        for each in drifts
    ]
    lines += [
        f"{each.reservation_id}: is {_state(each.state)}, its task wants it {_state(each.wanted_state)}"
        for each in disputes
    ]
    lines += [f"Drift {len(drifts)}. {compared:,} reservations compared with their tasks, {len(disputes):,} differ."]
    if disputes and not drifts:
        lines += ["If the broker is away or behind, what has ended is on its way: run it again when it is well."]
    shell.answer(
        {
            "reservations": compared,
            "drifts": [document(each) for each in drifts],
            "disputes": [document(each) for each in disputes],
        },
        "\n".join(lines),
    )
    if drifts or disputes:
        raise SystemExit(FAILED)


@cli.command()
@click.pass_obj
def doctor(shell: Shell) -> None:
    """Check what is needed to work here, and say how to mend what is wrong."""

    async def main() -> list[checks.Finding]:
        found = []
        async for finding in checks.findings(shell.server, shell.credentials):
            found.append(finding)
            if not shell.json:
                click.echo(_line(finding))
        return found

    found = asyncio.run(main())
    well = all(finding.ok is not False for finding in found)
    rows = [{"name": each.name, "ok": each.ok, "text": each.text, "mend": each.mend} for each in found]
    shell.answer({"ok": well, "checks": rows}, "All is well." if well else "Something is wrong.")
    if not well:
        raise SystemExit(FAILED)


@cli.command()
@click.argument("kind", metavar="bash|zsh|fish", type=click.Choice(["bash", "zsh", "fish"]))
def completion(kind: str) -> None:
    """Print what makes a shell complete our commands.

    \b
    bash: echo 'eval "$(atelier completion bash)"' >> ~/.bashrc
    zsh:  echo 'eval "$(atelier completion zsh)"' >> ~/.zshrc
    fish: atelier completion fish > ~/.config/fish/completions/atelier.fish
    """  # noqa: D301 - click's mark for lines to keep
    found = get_completion_class(kind)
    if found is None:
        raise click.UsageError(f"{kind} is not known.")
    click.echo(found(cli, {}, "atelier", "_ATELIER_COMPLETE").source())


@cli.group()
def admin() -> None:
    """Run the installation."""


@admin.command()
@click.argument("login")
@click.option(
    "--secret-file",
    type=click.Path(path_type=Path),
    help="The installation's admin secret; default secrets/admin in $ATELIER_VAR, else in ./var.",
)
@connected
async def grant(shell: Shell, atelier: Atelier, login: str, secret_file: Path | None) -> None:
    """Make LOGIN, a username or email, an administrator, by the installation's own secret."""
    path = secret_file or Path(os.environ.get("ATELIER_VAR") or "var") / "secrets" / "admin"
    if not path.is_file():
        raise click.UsageError(f"{path} is not there; run this on the server where it is, or give --secret-file.")
    user = await atelier.grant_admin(login, path.read_text().strip())
    session = atelier.session()
    if session is not None and session.user_id == user.user_id:
        await atelier.refresh()  # the role stands in the token
    text = f"{user.username} is an administrator now; so are other sessions of theirs, within seconds."
    shell.answer({"user": document(user)}, text)


@admin.command()
@click.argument("user_id")
@click.option("--tasks", type=click.IntRange(0), help="Tasks a month; not given: what the role has.")
@click.option("--storage-bytes", type=click.IntRange(0), help="Bytes in storage; not given: what the role has.")
@connected
async def set_limits(
    shell: Shell, atelier: Atelier, user_id: str, tasks: int | None, storage_bytes: int | None
) -> None:
    """Set an account's own limits."""
    _show_quota(shell, await atelier.set_limits(user_id, tasks=tasks, storage_bytes=storage_bytes))


@admin.command()
@click.argument("user_id")
@click.option("--role", type=click.Choice(list(ROLES)))
@click.option("--status", type=click.Choice(list(STATUSES)))
@connected
async def set_role(shell: Shell, atelier: Atelier, user_id: str, role: str | None, status: str | None) -> None:
    """Set an account's role or status; what is not given stays."""
    if role is None and status is None:
        raise click.UsageError("Give --role or --status.")
    user = await atelier.set_role(
        user_id,
        role=ROLES[role] if role else User.ROLE_UNSPECIFIED,
        status=STATUSES[status] if status else User.STATUS_UNSPECIFIED,
    )
    text = f"{user.username}: {User.Role.Name(user.role)}, {User.Status.Name(user.status)}"
    shell.answer({"user": document(user)}, text)


@admin.command()
@connected
async def rotate_keys(shell: Shell, atelier: Atelier) -> None:
    """Make a new key for signing tokens."""
    key = await atelier.rotate_keys()
    shell.answer(document(key), f"The key {key.key_id} signs from {local_time(key.sign_time)}.")


def _show_quota(shell: Shell, found: Quota) -> None:
    rows = table("", "used", "reserved", "limit")
    tasks, storage = found.tasks, found.storage_bytes
    rows.add_row("tasks this month", f"{tasks.used:,}", f"{tasks.reserved:,}", f"{tasks.limit:,}")
    rows.add_row("storage", size(storage.used), size(storage.reserved), size(storage.limit))
    shell.answer({"quota": document(found)}, rows)


def _amounts(amounts: AuditQuotasResponse.Amounts) -> str:
    return f"{amounts.used} used + {amounts.reserved} reserved"


def _state(state: Reservation.State.ValueType) -> str:
    return Reservation.State.Name(state).removeprefix("STATE_")


def _line(finding: checks.Finding) -> str:
    mark = {True: "ok", False: "WRONG", None: "-"}[finding.ok]
    mend = f"\n{'':19}{finding.mend}" if finding.mend else ""
    return f"{mark:<5} {finding.name:<13}{finding.text}{mend}"


def main() -> None:
    """Run the command, and end the process with its exit code."""
    shell = Shell()
    try:
        code = _ran(shell)
    except BrokenPipeError:
        # Nobody reads on, e.g. `atelier tasks | head`. Python must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    sys.exit(code)


def _ran(shell: Shell) -> int:
    try:
        cli.main(prog_name="atelier", standalone_mode=False, obj=shell)
        sys.stdout.flush()
    except click.UsageError as error:
        if shell.json or "--json" in sys.argv:  # the mistake may stand before it
            shell.complain(InvalidArgument(error.format_message(), reason="USAGE"))
        else:
            error.show()
        return USAGE
    except click.Abort:
        return _ended(shell, Interrupted("Interrupted."))
    except BrokenPipeError:
        raise
    except AtelierError as error:
        if os.environ.get("ATELIER_DEBUG"):
            raise
        return _ended(shell, error)
    except Exception as error:
        if os.environ.get("ATELIER_DEBUG"):
            raise
        return _ended(shell, _explained(error))
    return OK


def _ended(shell: Shell, error: AtelierError) -> int:
    shell.complain(error)
    return exit_code(error)


def _explained(error: Exception) -> AtelierError:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        explained = AtelierError(f"{where}{error.strerror}.", reason="FILE_UNUSABLE")
    else:
        text = f"Something unexpected: {error!r}. ATELIER_DEBUG=1 shows where."
        explained = AtelierError(text, reason="UNEXPECTED")
    for note in getattr(error, "__notes__", ()):
        explained.add_note(note)
    return explained


if __name__ == "__main__":
    main()
