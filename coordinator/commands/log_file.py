"""`syncpoint log backup` and `syncpoint log restore`, for logs that are a file.

Nothing but the log is opened: the participants may be down, and services run beside a backup.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.commands.options import Application, ConfigFile, Json
from coordinator.errors import ConfigurationError

if TYPE_CHECKING:
    from coordinator.log.sqlite.copying import Contents, Progress
    from coordinator.members.base import Members

log_app = typer.Typer(
    name="log",
    help="Back up the decision log, and restore it.",
    rich_markup_mode="markdown",
)


@log_app.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    config: ConfigFile = None,
    application: Application = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace FILE if it is there already.")
    ] = False,
    json: Json = False,
) -> int:
    """Copy the decision log to FILE, as it is at one moment, beside the services that use it.

    FILE appears whole and synced, readable by its owner alone, or not at all. Copy a log by this
    command and by nothing else: a plain copy of its file misses decisions.
    """
    from coordinator.commands.output import print_json, results
    from coordinator.log.sqlite.backup import back_up

    path, _ = _file_of_log(config, application)
    with _copied_pages("copying the log") as progress:
        found = back_up(path, file, force=force, progress=progress)
    if json:
        print_json({"file": str(file), **_as_plain(found)})
        return 0
    results().print(f"Backed up {_told(found)} to {file}.", soft_wrap=True)
    results().print(
        "Restored later, it knows nothing of what is decided from now on: branches of that which "
        "are still prepared then are quarantined for a person, and idempotency keys used since are "
        f"free again. {_unfinished(found)}",
        soft_wrap=True,
    )
    return 0


@log_app.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `log backup` has written.")],
    config: ConfigFile = None,
    application: Application = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a log that is there; it is kept under another name."),
    ] = False,
    json: Json = False,
) -> int:
    """Make a backup the decision log again. Only for a log that is lost or damaged.

    End every process that uses the log first. The backup is checked, and its horizon raised to the
    present: it knows nothing of what was decided later, so nothing of that time is presumed
    aborted. What is still prepared is quarantined and shown by `syncpoint list`, for you to compare
    the databases and decide. Unfinished commits in the backup are finished again, harmlessly.
    """
    from coordinator.commands.output import print_json, results
    from coordinator.log.sqlite import restore as restoring

    path, members = _file_of_log(config, application)
    alive = asyncio.run(members.alive())
    if alive:
        raise ConfigurationError(
            f"the decision log {path} has living members ({', '.join(alive)}): end all processes "
            "that use it, and try again"
        )
    with _copied_pages("checking the backup") as progress:
        done = restoring.restore(path, file, force=force, progress=progress)
    kept = None if done.kept is None else str(done.kept)
    if json:
        print_json({"file": str(path), "kept": kept, **_as_plain(done.contents)})
        return 0
    results().print(f"Restored {_told(done.contents)} to {path}.", soft_wrap=True)
    if kept is not None:
        results().print(f"The log that was there is kept as {kept}.", soft_wrap=True)
    for line in (
        "What was decided after the backup is unknown now. Its branches that are still prepared "
        "are never presumed aborted: `syncpoint recover` quarantines them, `syncpoint list` shows "
        "them, and you end each by `syncpoint resolve ID --branch B` when you have compared the "
        "databases.",
        _unfinished(done.contents),
        "Idempotency keys used after the backup are free again: a repeated request runs once more.",
    ):
        results().print(line, soft_wrap=True)
    return 0


def _file_of_log(config: Path | None, application: str | None) -> tuple[Path, Members]:
    """Raises `ConfigurationError` for a log that is no file."""
    from coordinator.commands.target import load
    from coordinator.log import open_log
    from coordinator.log.sqlite import SQLiteLog

    url = load(config, application).log_url
    log, members = open_log(url)
    if isinstance(log, SQLiteLog):
        return log.path, members
    raise ConfigurationError(
        f"the log {url} is in the memory of each process and ends with it: there is nothing to "
        "back up or restore; for more than trials name a file: sqlite:///syncpoint.db"
    )


@contextmanager
def _copied_pages(what: str) -> Iterator[Progress]:
    from coordinator.commands.output import messages, progress_bar

    bar = progress_bar(messages())
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def _told(found: Contents) -> str:
    newest = datetime.fromtimestamp(found.newest_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"the decision log {found.log} with {found.records} records, up to {newest},"


def _unfinished(found: Contents) -> str:
    if not found.unfinished:
        return "No commit in it is unfinished."
    return (
        f"Of its commits {found.unfinished} are unfinished: `syncpoint recover`, or any service, "
        "finishes them again, which does no harm where they have ended."
    )


def _as_plain(found: Contents) -> dict[str, object]:
    return {
        "log": found.log,
        "version": found.version,
        "records": found.records,
        "unfinished": found.unfinished,
        "newest_ms": found.newest_ms,
    }
