"""`syncpoint recover`: rounds of the sweep until nothing is left that can be ended now.

Two quick rounds at least, since a living member's branch is acted on when two rounds have seen it;
then on for as long as a round ends something, or `wait` seconds, or until nothing is in doubt.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coordinator.commands.output import messages, print_json, progress_bar, results
from coordinator.coordinator import Coordinator
from coordinator.errors import LogUnavailable, one_line
from coordinator.model import Status, TransactionId, Verdict
from coordinator.recovery import Round
from coordinator.sweep import Case

EXIT_CLEAN = 0
EXIT_IN_DOUBT = 3
EXIT_PERSON_NEEDED = 4

PAUSE_SECONDS = 0.2
WAITING_PAUSE_SECONDS = 1.0
ROWS_MAX = 50

Progress = Callable[[int, int], None]


class Finding(msgspec.Struct):
    """One transaction that was found unfinished."""

    transaction: TransactionId
    prepared_in: list[str]
    recorded: str
    """What the log said when it was found: commit, abort, delegated, or nothing."""
    result: str


class Report(msgspec.Struct):
    """All rounds together; `last` is the state in which they ended.

    `in_doubt` are those that two rounds have seen: what a busy service has prepared just now, and
    ends by itself a moment later, is none of them.
    """

    last: Round = msgspec.field(default_factory=Round)
    in_doubt: set[TransactionId] = msgspec.field(default_factory=set)
    committed: int = 0
    aborted: int = 0
    quarantined: int = 0
    rounds: int = 0
    dry_run: bool = False
    log_error: str = ""
    findings: dict[TransactionId, Finding] = msgspec.field(default_factory=dict)

    @property
    def person_needed(self) -> bool:
        return bool(self.last.incidents or self.last.unreadable)

    @property
    def clean(self) -> bool:
        left = self.in_doubt or self.last.unreachable or self.last.unreadable or self.log_error
        return self.rounds > 0 and not left

    @property
    def exit_code(self) -> int:
        if self.person_needed:
            return EXIT_PERSON_NEEDED
        return EXIT_CLEAN if self.clean else EXIT_IN_DOUBT


def run(coordinator: Coordinator, *, dry_run: bool, wait: float, as_json: bool) -> int:
    """Recover, tell what was found and done, and return the exit code."""
    bar = progress_bar(messages())
    with bar:
        task = bar.add_task("recovering", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        report = asyncio.run(_recover(coordinator, dry_run, wait, progress))
    if as_json:
        print_json(_as_plain(report))
    else:
        _show(report, results())
    for line in _what_is_left(report):
        messages().print(escape(f"syncpoint: {one_line(line)}"), soft_wrap=True)
    return report.exit_code


async def _recover(
    coordinator: Coordinator, dry_run: bool, wait: float, progress: Progress
) -> Report:
    report = Report(dry_run=dry_run)
    give_up = time.monotonic() + wait
    while True:
        try:
            report.log_error = ""
            await _recover_once(coordinator, report, progress)
        except LogUnavailable as error:
            report.log_error = str(error)
        if report.clean or dry_run or time.monotonic() >= give_up:
            return report
        # The coordinator is opened anew, so that a participant which was down is found again.
        await asyncio.sleep(min(WAITING_PAUSE_SECONDS, max(give_up - time.monotonic(), 0)))


async def _recover_once(coordinator: Coordinator, report: Report, progress: Progress) -> None:
    """Rounds for as long as they end something, and two at least."""
    await coordinator.open(sweep=False, tolerate_unreachable=True)
    try:
        rounds = 0
        while True:
            latest = await coordinator.recover(progress, dry_run=report.dry_run)
            rounds += 1
            await _add(coordinator, report, latest)
            ended_something = latest.committed or latest.aborted or latest.quarantined
            if latest.clean or (rounds >= 2 and not ended_something):
                _add_left_alone(report)
                return
            await asyncio.sleep(PAUSE_SECONDS)
    finally:
        await coordinator.close()


async def _add(coordinator: Coordinator, report: Report, latest: Round) -> None:
    report.in_doubt = latest.in_doubt & report.last.in_doubt
    report.last = latest
    report.rounds += 1
    report.committed += latest.committed
    report.aborted += latest.aborted
    report.quarantined += latest.quarantined
    for case in latest.cases:
        result = await _result(coordinator, report, case)
        report.findings[case.transaction] = Finding(
            case.transaction,
            sorted(branch.participant for branch in case.branches),
            str(case.record.decision.verdict) if case.record else "nothing",
            result,
        )


def _add_left_alone(report: Report) -> None:
    for transaction in report.in_doubt - report.findings.keys():
        why = "left alone: a living process may still work on it"
        report.findings[transaction] = Finding(transaction, [], "", why)


async def _result(coordinator: Coordinator, report: Report, case: Case) -> str:
    if report.dry_run:
        commits = case.record is not None and case.record.decision.verdict is Verdict.COMMIT
        return "would commit" if commits else "would roll back, unless a commit is recorded first"
    if case.transaction in report.last.in_doubt:
        return _why_in_doubt(report.last, case)
    status = await coordinator.status(case.transaction)
    return {
        Status.COMMITTED: "committed",
        Status.ABORTED: "rolled back",
        Status.FORGOTTEN: "older than the log: shown to a person, if it is still there",
        Status.UNDECIDED: "ended by another process",
    }[status]


def _why_in_doubt(latest: Round, case: Case) -> str:
    named = case.record.decision.branches if case.record else case.branches
    ended = case.record.ended if case.record else frozenset()
    waiting = {branch.participant for branch in named if branch.id not in ended}
    absent = sorted(waiting & latest.unreachable.keys())
    return f"in doubt: waits for {', '.join(absent)}" if absent else "in doubt: to be tried again"


def _what_is_left(report: Report) -> list[str]:
    """Why the exit code is not 0, a line each, with what to do about it."""
    lines = [
        f"participant {name} cannot be reached: {why}; bring it back, then run "
        "`syncpoint recover` again (or wait for it with --wait 60)"
        for name, why in sorted(report.last.unreachable.items())
    ]
    if report.log_error:
        lines.append(f"{report.log_error}; once the log answers, run `syncpoint recover` again")
    lines += [
        f"the record of transaction {transaction} cannot be read: {why}; run a version of "
        "syncpoint that can, or restore the log from its backup"
        for transaction, why in sorted(report.last.unreadable.items())
    ]
    if report.last.incidents:
        lines.append(
            "branches that ended against their decision or are quarantined: "
            f"{report.last.incidents}; compare the databases and mend them by hand"
        )
    if report.in_doubt and not report.last.unreachable:
        lines.append(
            f"{_transactions(len(report.in_doubt))} still in doubt; run `syncpoint recover "
            "--wait 60` to wait until nothing is"
        )
    return lines


def _show(report: Report, console: Console) -> None:
    if report.findings:
        table = Table(box=box.SIMPLE)
        table.add_column("transaction", overflow="fold")
        for heading in ("prepared in", "the log says", "result"):
            table.add_column(heading)
        for _, finding in sorted(report.findings.items())[:ROWS_MAX]:
            cells = (", ".join(finding.prepared_in), finding.recorded, finding.result)
            table.add_row(finding.transaction, *(escape(cell) for cell in cells))
        console.print(table)
        if len(report.findings) > ROWS_MAX:
            console.print(f"... and {len(report.findings) - ROWS_MAX} more; --json shows them all")
    console.print(_summary(report), soft_wrap=True)


def _summary(report: Report) -> str:
    if report.dry_run:
        return f"{_transactions(len(report.findings))} in doubt; nothing was changed (--dry-run)."
    if report.clean and not report.findings and not report.person_needed:
        return "Nothing is in doubt."
    return (
        f"{report.committed} committed, {report.aborted} rolled back, "
        f"{len(report.in_doubt)} still in doubt, {report.last.incidents} for a person."
    )


def _transactions(count: int) -> str:
    return f"{count} transaction{'' if count == 1 else 's'}"


def _as_plain(report: Report) -> dict[str, object]:
    return {
        "committed": report.committed,
        "rolled_back": report.aborted,
        "in_doubt": sorted(report.in_doubt),
        "quarantined": report.quarantined,
        "incidents": report.last.incidents,
        "unreachable": report.last.unreachable,
        "unreadable": report.last.unreadable,
        "log_error": report.log_error,
        "dry_run": report.dry_run,
        "exit_code": report.exit_code,
        "transactions": [
            msgspec.to_builtins(finding) for _, finding in sorted(report.findings.items())
        ],
    }
