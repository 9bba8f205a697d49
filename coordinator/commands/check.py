"""`syncpoint check`: every participant and the log say what is set against what is needed.

Nothing is opened, joined or changed, so that it runs beside services and before the first one. All
participants are asked at once, each finds for itself, and none stops the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coordinator.commands.output import print_json, results
from coordinator.config import Settings
from coordinator.coordinator import Coordinator
from coordinator.errors import one_line
from coordinator.log import open_log
from coordinator.log.base import Log
from coordinator.model import LogId
from coordinator.participant import (
    Checkable,
    CheckableLog,
    Finding,
    Level,
    LogCheck,
    Participant,
)

EXIT_GOOD = 0
EXIT_MUST_CHANGE = 2

_MARKS = {
    Level.OK: "[green]✓[/]",
    Level.NOTE: "[yellow]![/]",
    Level.MUST_CHANGE: "[bold red]✗[/]",
}


class Checked(msgspec.Struct, frozen=True):
    """One participant, or the log, and what was found there."""

    name: str
    findings: Sequence[Finding]


class Report(msgspec.Struct, frozen=True):
    log: Checked
    participants: Sequence[Checked]

    def count(self, level: Level) -> int:
        checked = (self.log, *self.participants)
        return sum(finding.level is level for each in checked for finding in each.findings)

    @property
    def exit_code(self) -> int:
        return EXIT_MUST_CHANGE if self.count(Level.MUST_CHANGE) else EXIT_GOOD


def run(coordinator: Coordinator, *, as_json: bool) -> int:
    """Check, tell, and return the exit code."""
    report = asyncio.run(_check(coordinator))
    if as_json:
        print_json(_as_plain(report, coordinator.cluster))
    else:
        _show(report, results())
    return report.exit_code


def show_role_sql(coordinator: Coordinator, *, as_json: bool) -> int:
    """What makes a role of least privilege at each participant that has such a thing."""
    found = {
        each.name: each.role_sql()
        for each in coordinator.participants
        if isinstance(each, Checkable)
    }
    if as_json:
        print_json(found)
    else:
        print("\n".join(found.values()), end="")
    return EXIT_GOOD


async def _check(coordinator: Coordinator) -> Report:
    log, _ = open_log(coordinator.log_url)
    found = await _check_log(log, coordinator.settings)
    checks = [
        _check_participant(each, found.log, coordinator.settings)
        for each in coordinator.participants
    ]
    return Report(Checked("decision log", found.findings), await asyncio.gather(*checks))


async def _check_log(log: Log, settings: Settings) -> LogCheck:
    if isinstance(log, CheckableLog):
        return await log.check(settings)
    return LogCheck(None, [_unchecked()])


async def _check_participant(
    participant: Participant, log: LogId | None, settings: Settings
) -> Checked:
    if not isinstance(participant, Checkable):
        return Checked(participant.name, [_unchecked()])
    try:
        findings = await participant.check(log, settings)
    except Exception as error:
        message = f"the check itself failed with {type(error).__name__}: {one_line(error)}"
        fix = "report it to the author of the adapter"
        findings = [Finding("check", Level.MUST_CHANGE, message, fix)]
    return Checked(participant.name, findings)


def _unchecked() -> Finding:
    return Finding("check", Level.NOTE, "this kind has no check: nothing is known of its settings")


def _show(report: Report, console: Console) -> None:
    for checked in (report.log, *report.participants):
        table = Table(
            title=escape(checked.name), title_justify="left", title_style="bold",
            box=box.SIMPLE, show_header=False,
        )  # fmt: skip
        for column in ("mark", "subject"):
            table.add_column(column, no_wrap=True)
        table.add_column("message", overflow="fold")
        for finding in checked.findings:
            told = escape(finding.message)
            if finding.fix:
                told += f"\n[bold]Fix:[/] {escape(finding.fix)}"
            table.add_row(_MARKS[finding.level], escape(finding.subject), told)
        console.print(table)
    console.print(_summary(report), soft_wrap=True)


def _summary(report: Report) -> str:
    wrong, notes = report.count(Level.MUST_CHANGE), report.count(Level.NOTE)
    noted = f"{notes} note{'' if notes == 1 else 's'}"
    if wrong:
        return f"{wrong} must change, {noted}."
    return f"Nothing must change, {noted}."


def _as_plain(report: Report, cluster: str) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "cluster": cluster,
        "must_change": report.count(Level.MUST_CHANGE),
        "notes": report.count(Level.NOTE),
        "exit_code": report.exit_code,
    }
    plain.update(msgspec.to_builtins(report))
    return plain
