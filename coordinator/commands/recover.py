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

from coordinator.commands.next_step import to_type
from coordinator.commands.output import messages, print_json, progress_bar, results
from coordinator.coordinator import Coordinator
from coordinator.errors import LogUnavailable, one_line
from coordinator.log.base import Incident
from coordinator.model import Status, TransactionId, Verdict, Xid
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
    missing: list[str] = msgspec.field(default_factory=list)
    """Participants of branches that have not ended, which are not configured here."""


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
    def settled(self) -> bool:
        """Waiting longer changes nothing: what is left, if anything, is for a person."""
        in_doubt = self.in_doubt - self.last.unreadable.keys()
        return self.rounds > 0 and not (in_doubt or self.last.unreachable or self.log_error)

    @property
    def parked(self) -> set[TransactionId]:
        """In doubt until a process that has all of their participants ends them."""
        return {each.transaction for each in self.findings.values() if each.missing} & self.in_doubt

    @property
    def person_needed(self) -> bool:
        return bool(self.last.incidents or self.last.unreadable)

    @property
    def clean(self) -> bool:
        return self.settled and not self.last.unreadable

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
            await _recover_open(coordinator, report, give_up, progress)
        except LogUnavailable as error:
            report.log_error = str(error)
        if report.settled or dry_run or time.monotonic() >= give_up:
            return report
        # The coordinator is opened anew, so that a participant which was down is found again.
        await asyncio.sleep(min(WAITING_PAUSE_SECONDS, max(give_up - time.monotonic(), 0)))


async def _recover_open(
    coordinator: Coordinator, report: Report, give_up: float, progress: Progress
) -> None:
    """Rounds for as long as they end something, two at least, and until `give_up` if more is left.

    The coordinator stays open between them: a branch of a living member is acted on only by a
    sweeper that has watched it. It is to be opened anew where a participant is away.
    """
    await coordinator.open(sweep=False, tolerate_unreachable=True)
    try:
        rounds = 0
        while True:
            latest = await coordinator.recover(progress, dry_run=report.dry_run)
            rounds += 1
            await _add(coordinator, report, latest)
            ended_something = latest.committed or latest.aborted or latest.quarantined
            quiet = rounds >= 2 and not ended_something
            left = give_up - time.monotonic()
            waits = left > 0 and not (report.dry_run or report.settled or latest.unreachable)
            if latest.clean or (quiet and not waits):
                _add_left_alone(report)
                return
            await asyncio.sleep(min(WAITING_PAUSE_SECONDS, left) if quiet else PAUSE_SECONDS)
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
        report.findings[case.transaction] = await _finding(coordinator, report, case)
    for transaction, why in latest.unreadable.items():
        parked = f"parked: its record cannot be read: {one_line(why)}"
        report.findings[transaction] = Finding(transaction, [], "unreadable", parked)


def _add_left_alone(report: Report) -> None:
    for transaction in report.in_doubt - report.findings.keys():
        why = "left alone: a living process may still work on it"
        report.findings[transaction] = Finding(transaction, [], "", why)


async def _finding(coordinator: Coordinator, report: Report, case: Case) -> Finding:
    record = case.record
    named = record.decision.named if record else case.branches
    ended = record.ended if record else frozenset()
    waits_for = {branch.participant for branch in named if branch.id not in ended}
    missing = sorted(waits_for - {each.name for each in coordinator.participants})
    in_doubt = case.transaction in report.last.in_doubt
    if report.dry_run:
        commits = record is not None and record.decision.verdict is Verdict.COMMIT
        result = "would commit" if commits else "would roll back, unless a commit is recorded first"
    elif in_doubt:
        result = _why_in_doubt(missing, sorted(waits_for & report.last.unreachable.keys()))
    else:
        result = _RESULTS[await coordinator.status(case.transaction)]
    return Finding(
        case.transaction,
        sorted(branch.participant for branch in case.branches),
        str(record.decision.verdict) if record else "nothing",
        result,
        missing if in_doubt else [],
    )


def _why_in_doubt(missing: list[str], away: list[str]) -> str:
    if missing:
        return f"parked: not configured here: {', '.join(missing)}"
    return f"in doubt: waits for {', '.join(away)}" if away else "in doubt: to be tried again"


_RESULTS = {
    Status.COMMITTED: "committed",
    Status.ABORTED: "rolled back",
    Status.FORGOTTEN: "older than the log: shown to a person, if it is still there",
    Status.UNDECIDED: "ended by another process",
}


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
    lines += [
        f"transaction {each} is parked: {', '.join(report.findings[each].missing)} is not "
        "configured here; recover where it is, or put it back into the configuration"
        for each in sorted(report.parked)[:ROWS_MAX]
    ]
    if report.last.incidents:
        lines.append(
            f"{_branches(len(report.last.incidents))} for a person: compare the databases, mend "
            "them by hand, and type what is told for each above"
        )
    waiting = report.in_doubt - report.parked - report.last.unreadable.keys()
    if waiting and not report.last.unreachable:
        lines.append(
            f"{_transactions(len(waiting))} still in doubt; run `syncpoint recover "
            "--wait 60` to wait until nothing is"
        )
    return lines


def _show(report: Report, console: Console) -> None:
    if report.findings:
        table = Table(box=box.SIMPLE, pad_edge=False)
        table.add_column("transaction", no_wrap=True)
        for heading in ("prepared in", "the log says", "result"):
            table.add_column(heading)
        for _, finding in sorted(report.findings.items())[:ROWS_MAX]:
            cells = (", ".join(finding.prepared_in), finding.recorded, finding.result)
            table.add_row(finding.transaction, *(escape(cell) for cell in cells))
        console.print(table)
        if len(report.findings) > ROWS_MAX:
            console.print(f"... and {len(report.findings) - ROWS_MAX} more; --json shows them all")
    for incident in report.last.incidents[:ROWS_MAX]:
        _show_incident(incident, console)
    console.print(_summary(report), soft_wrap=True)


def _show_incident(incident: Incident, console: Console) -> None:
    xid = Xid.parse(incident.gid)
    branch = incident.gid if xid is None else f"{xid.branch} of transaction {xid.transaction}"
    lines = [
        f"{incident.participant}: {incident.kind or 'quarantined'}, branch {branch}",
        f"  {one_line(incident.evidence)}",
    ]
    look_first = [] if xid is None else [f"syncpoint show {xid.transaction}"]
    lines += [f"  type: {command}" for command in [*look_first, *to_type(incident)]]
    for line in lines:
        console.print(escape(line), soft_wrap=True)


def _summary(report: Report) -> str:
    if report.dry_run:
        return f"{_transactions(len(report.findings))} in doubt; nothing was changed (--dry-run)."
    if report.clean and not report.findings and not report.person_needed:
        return "Nothing is in doubt."
    return (
        f"{report.committed} committed, {report.aborted} rolled back, "
        f"{len(report.in_doubt)} still in doubt, {len(report.last.incidents)} for a person."
    )


def _plain_incident(incident: Incident) -> dict[str, object]:
    """With the commands of which one is to be typed, once the databases have been compared."""
    xid = Xid.parse(incident.gid)
    names = {} if xid is None else {"transaction": xid.transaction, "branch": xid.branch}
    kind = "quarantined" if incident.kind is None else str(incident.kind)
    plain: dict[str, object] = msgspec.to_builtins(incident)
    return plain | names | {"kind": kind, "commands": to_type(incident)}


def _transactions(count: int) -> str:
    return f"{count} transaction{'' if count == 1 else 's'}"


def _branches(count: int) -> str:
    return "1 branch is" if count == 1 else f"{count} branches are"


def _as_plain(report: Report) -> dict[str, object]:
    return {
        "committed": report.committed,
        "rolled_back": report.aborted,
        "in_doubt": sorted(report.in_doubt),
        "quarantined": report.quarantined,
        "incidents": [_plain_incident(incident) for incident in report.last.incidents],
        "unreachable": report.last.unreachable,
        "unreadable": report.last.unreadable,
        "log_error": report.log_error,
        "dry_run": report.dry_run,
        "exit_code": report.exit_code,
        "transactions": [
            msgspec.to_builtins(finding) for _, finding in sorted(report.findings.items())
        ],
    }
