"""`syncpoint show ID`: what is known of one transaction, and what will happen to it.

What the record says of a branch and what its participant really holds stand side by side. Nothing
is driven and nothing changed.
"""

from __future__ import annotations

import asyncio

import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coordinator.commands.list_transactions import (
    BranchView,
    Picture,
    State,
    View,
    look,
    shown_age,
    shown_owner,
    tell_unreachable,
)
from coordinator.commands.output import messages, print_json, results
from coordinator.coordinator import Coordinator
from coordinator.errors import ConfigurationError
from coordinator.log.base import Record
from coordinator.model import Status, TransactionId, Verdict, parse_transaction_id

EXIT_SHOWN = 0
EXIT_NO_SUCH = 5


class ShownBranch(msgspec.Struct, frozen=True):
    """One branch: `recorded` is what the record says, `holds` what its participant has now."""

    participant: str
    branch: str
    recorded: str
    holds: str
    evidence: str


class Shown(msgspec.Struct, frozen=True):
    """Everything about one transaction; `decision` is what the log says, or nothing."""

    view: View
    decision: str
    attachment_bytes: int
    branches: list[ShownBranch]
    next: str


def run(coordinator: Coordinator, transaction: str, *, as_json: bool) -> int:
    """Look, tell, and return the exit code. Raises `ConfigurationError` for what is no id."""
    try:
        transaction_id = parse_transaction_id(transaction)
    except ValueError as error:
        raise ConfigurationError(f"{error}; `syncpoint list --all` shows the ids") from error
    picture, status = asyncio.run(_look(coordinator, transaction_id))
    view = picture.view(transaction_id)
    if view is None:
        why = _why_none(status)
        messages().print(f"syncpoint: no transaction {transaction_id}: {why}", soft_wrap=True)
        tell_unreachable(picture)
        return EXIT_NO_SUCH
    shown = _put_together(view, picture, coordinator.settings.sweep_interval)
    if as_json:
        print_json(_as_plain(shown, picture))
    else:
        _show(shown, results())
    tell_unreachable(picture)
    return EXIT_SHOWN


async def _look(
    coordinator: Coordinator, transaction: TransactionId
) -> tuple[Picture, Status | None]:
    """What is seen, and where nothing is, what the log says of such an id."""
    await coordinator.open(sweep=False, tolerate_unreachable=True)
    try:
        picture = await look(coordinator, also=transaction)
        known = picture.view(transaction) is not None
        return picture, None if known else await coordinator.status(transaction)
    finally:
        await coordinator.close()


def _why_none(status: Status | None) -> str:
    if status is Status.FORGOTTEN:
        return "it is older than what the log keeps, and no participant holds a branch of it"
    return (
        "nothing is recorded and nothing prepared, so it has not begun, is younger than a second, "
        "or ended without needing a record"
    )


def _put_together(view: View, picture: Picture, sweep_interval: float) -> Shown:
    record = picture.records.get(view.transaction)
    held = {branch.id for branch in picture.held.get(view.transaction, ())}
    branches = [
        ShownBranch(
            each.participant,
            each.branch,
            "unreadable" if view.why_unreadable else _recorded(each, record),
            _holds(each, each.branch in held, picture),
            each.evidence,
        )
        for each in view.branches
    ]
    nothing = "unreadable" if view.why_unreadable else "nothing"
    decision = nothing if record is None else _decision(record)
    attachment = 0 if record is None else len(record.attachment)
    return Shown(view, decision, attachment, branches, _next(view, record, picture, sweep_interval))


def _decision(record: Record) -> str:
    verdict = str(record.decision.verdict)
    return f"{verdict}, answered {record.answer}" if record.answer else verdict


def _recorded(branch: BranchView, record: Record | None) -> str:
    if record is None:
        return "nothing"
    if all(branch.branch != each.id for each in record.decision.named):
        return "not named"
    return "ended" if branch.branch in record.ended else "to be ended"


def _holds(branch: BranchView, held: bool, picture: Picture) -> str:
    if held:
        return "prepared"
    if branch.participant in picture.unreachable:
        return "unknown: unreachable"
    if branch.state in ("working", "undecided", "not configured"):
        return f"unknown: {branch.state}"
    return "nothing prepared"


def _next(view: View, record: Record | None, picture: Picture, sweep_interval: float) -> str:
    """What will happen, who does it, and when."""
    verdict = None if record is None else record.answer or record.decision.verdict
    if view.why_unreadable:
        return (
            f"nothing: its record cannot be read ({view.why_unreadable}); run a version of "
            "syncpoint that can, or restore the log from its backup"
        )
    if view.state is State.NEEDS_PERSON:
        return "nothing by itself: compare the databases and mend them by hand"
    if view.state is State.FINISHED:
        ended = "committed" if verdict is Verdict.COMMIT else "rolled back"
        return f"nothing: it has {ended} everywhere, and its record is kept for a while"
    end = {
        None: "is rolled back, unless a commit is recorded first",
        Verdict.ABORT: "is rolled back",
        Verdict.COMMIT: "is committed",
        Verdict.DELEGATED: "ends as its last resource answers",
    }[verdict]
    away = sorted({each.participant for each in view.branches} & picture.unreachable.keys())
    waits = f", once {' and '.join(away)} can be reached" if away else ""
    if view.state is State.IN_FLIGHT:
        left = view.seconds_left
        within = f" within {left:.0f} s" if left and record is None else ""
        return f"its owner goes on with it{within}; what it does not end itself {end}{waits}"
    if picture.services:
        return f"with a sweep of a service, every {sweep_interval:g} s, it {end}{waits}"
    return f"no service runs: with `syncpoint recover`, or once one does, it {end}{waits}"


def _show(shown: Shown, console: Console) -> None:
    view = shown.view
    facts = {
        "transaction": view.transaction,
        "began": f"{shown_age(view.age_seconds)} ago",
        "state": f"{view.state}, {view.phase}",
        "owner": shown_owner(view).removeprefix("owner "),
        "the log says": shown.decision,
        "attachment": f"{shown.attachment_bytes} bytes",
        "next": shown.next,
    }
    for name, value in facts.items():
        console.print(f"{name:13} {escape(value)}", soft_wrap=True)
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("participant", "branch", "the record", "really holds"):
        table.add_column(heading, overflow="fold")
    for each in shown.branches:
        table.add_row(escape(each.participant), each.branch, each.recorded, each.holds)
    if shown.branches:
        console.print(table)
    for each in shown.branches:
        if each.evidence:
            console.print(escape(f"{each.participant}: {each.evidence}"), soft_wrap=True)


def _as_plain(shown: Shown, picture: Picture) -> dict[str, object]:
    plain: dict[str, object] = msgspec.to_builtins(shown.view)
    told: dict[str, object] = msgspec.to_builtins(shown)
    del told["view"]
    return plain | told | {"ended": shown.view.ended, "unreachable": picture.unreachable}
