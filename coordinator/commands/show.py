"""`syncpoint show ID`: what is known of one transaction, whom it blocks, and what happens next.

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
    View,
    look,
    shown_age,
    shown_owner,
    tell_unreachable,
)
from coordinator.commands.next_step import Next, next_step
from coordinator.commands.output import messages, print_json, results
from coordinator.commands.words import shown_word
from coordinator.coordinator import Coordinator
from coordinator.engine import Engine
from coordinator.errors import ConfigurationError, one_line
from coordinator.log.base import Record, Word
from coordinator.model import Branch, Status, TransactionId, parse_transaction_id
from coordinator.participant import ShowsWaiters, Waiter

EXIT_SHOWN = 0
EXIT_NO_SUCH = 5


class ShownBranch(msgspec.Struct, frozen=True):
    """One branch: `recorded` is what the record says, `holds` what its participant has now."""

    participant: str
    branch: str
    recorded: str
    holds: str
    evidence: str


class ShownWaiter(Waiter, frozen=True, kw_only=True):
    """A session that waits for one of its branches."""

    participant: str


class Waiting(msgspec.Struct):
    """Who waits for the branches of a transaction, and the participants that did not say."""

    waiters: list[ShownWaiter] = msgspec.field(default_factory=list)
    unknown: dict[str, str] = msgspec.field(default_factory=dict)


class Shown(msgspec.Struct, frozen=True):
    """Everything about one transaction; `decision` is what the log says, or nothing."""

    view: View
    decision: str
    attachment_bytes: int
    branches: list[ShownBranch]
    waiting: Waiting
    words: list[Word]
    next: Next


def parse_id(text: str) -> TransactionId:
    """The id that a command was given; raises `ConfigurationError` for what is none."""
    try:
        return parse_transaction_id(text)
    except ValueError as error:
        raise ConfigurationError(f"{error}; `syncpoint list --all` shows the ids") from error


def run(coordinator: Coordinator, transaction: str, *, as_json: bool) -> int:
    """Look, tell, and return the exit code. Raises `ConfigurationError` for what is no id."""
    transaction_id = parse_id(transaction)
    picture, waiting, status = asyncio.run(_look(coordinator, transaction_id))
    view = picture.view(transaction_id)
    if view is None:
        tell_none(transaction_id, status)
        tell_unreachable(picture)
        return EXIT_NO_SUCH
    shown = _put_together(view, picture, waiting, coordinator)
    if as_json:
        print_json(_as_plain(shown, picture))
    else:
        _show(shown, results())
    tell_unreachable(picture)
    return EXIT_SHOWN


def tell_none(transaction: TransactionId, status: Status | None) -> None:
    """A line on stderr that there is no such transaction, and why that may be."""
    why = _why_none(status)
    messages().print(f"syncpoint: no transaction {transaction}: {why}", soft_wrap=True)


async def _look(
    coordinator: Coordinator, transaction: TransactionId
) -> tuple[Picture, Waiting, Status | None]:
    """What is seen, and where nothing is, what the log says of such an id."""
    await coordinator.open(sweep=False, tolerate_unreachable=True)
    try:
        picture = await look(coordinator, also=transaction)
        if picture.view(transaction) is None:
            return picture, Waiting(), await coordinator.status(transaction)
        held = picture.held.get(transaction, [])
        return picture, await _ask_who_waits(coordinator.engine(), held), None
    finally:
        await coordinator.close()


async def _ask_who_waits(engine: Engine, held: list[Branch]) -> Waiting:
    waiting = Waiting()
    for name in sorted({branch.participant for branch in held}):
        participant = engine.participants[name]
        if not isinstance(participant, ShowsWaiters):
            waiting.unknown[name] = "it cannot tell"
            continue
        try:
            found = await participant.waiting([each for each in held if each.participant == name])
        except Exception as error:
            waiting.unknown[name] = one_line(error) or type(error).__name__
            continue
        waiting.waiters += [
            ShownWaiter(**msgspec.structs.asdict(each), participant=name) for each in found
        ]
    return waiting


def _why_none(status: Status | None) -> str:
    if status is Status.FORGOTTEN:
        return "it is older than what the log keeps, and no participant holds a branch of it"
    return (
        "nothing is recorded and nothing prepared, so it has not begun, is younger than a second, "
        "or ended without needing a record"
    )


def _put_together(
    view: View, picture: Picture, waiting: Waiting, coordinator: Coordinator
) -> Shown:
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
    return Shown(
        view,
        nothing if record is None else _decision(record),
        0 if record is None else len(record.attachment),
        branches,
        waiting,
        picture.words.get(view.transaction, []),
        next_step(view, record, picture, coordinator.settings),
    )


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
    if branch.participant not in picture.configured:
        return "unknown: not configured"
    if branch.state in ("working", "undecided"):
        return f"unknown: {branch.state}"
    return "nothing prepared"


def _show(shown: Shown, console: Console) -> None:
    view = shown.view
    facts = {
        "transaction": view.transaction,
        "began": f"{shown_age(view.age_seconds)} ago",
        "state": f"{view.state}, {view.phase}",
        "owner": shown_owner(view).removeprefix("owner "),
        "the log says": shown.decision,
        "attachment": f"{shown.attachment_bytes} bytes",
        "next": shown.next.text,
    }
    lines = [f"{name:13} {value}" for name, value in facts.items()]
    lines += [f"{'type':13} {command}" for command in shown.next.commands]
    lines += [f"{'a person said':13} {shown_word(word)}" for word in shown.words]
    for line in lines:
        console.print(escape(line), soft_wrap=True)
    _show_branches(shown.branches, console)
    _show_waiting(shown, console)


def _show_branches(branches: list[ShownBranch], console: Console) -> None:
    if not branches:
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("participant", "branch", "the record", "really holds"):
        table.add_column(heading, overflow="fold")
    for each in branches:
        table.add_row(escape(each.participant), each.branch, each.recorded, each.holds)
    console.print(table)
    for each in branches:
        if each.evidence:
            console.print(escape(f"{each.participant}: {each.evidence}"), soft_wrap=True)


def _show_waiting(shown: Shown, console: Console) -> None:
    waiting = shown.waiting
    for name, why in waiting.unknown.items():
        console.print(escape(f"{name}: who waits is not known: {why}"), soft_wrap=True)
    if not waiting.waiters:
        if not waiting.unknown and any(each.holds == "prepared" for each in shown.branches):
            console.print("No session waits for what it holds.")
        return
    table = Table(box=box.SIMPLE, pad_edge=False, title="Sessions that wait", title_justify="left")
    table.add_column("participant", overflow="fold")
    for heading in ("pid", "waits", "behind"):
        table.add_column(heading, no_wrap=True)
    table.add_column("query", overflow="fold")
    for each in waiting.waiters:
        table.add_row(
            escape(each.participant),
            str(each.session),
            "?" if each.seconds is None else shown_age(each.seconds),
            "the branch" if each.behind is None else str(each.behind),
            escape(each.query or f"({each.note})"),
        )
    console.print(table)


def _as_plain(shown: Shown, picture: Picture) -> dict[str, object]:
    """What `list` tells of it, and beside that: `next` is text, and its parts have their names."""
    plain: dict[str, object] = msgspec.to_builtins(shown.view)
    return plain | {
        "decision": shown.decision,
        "attachment_bytes": shown.attachment_bytes,
        "branches": msgspec.to_builtins(shown.branches),
        "waiters": msgspec.to_builtins(shown.waiting.waiters),
        "waiters_unknown": shown.waiting.unknown,
        "words": msgspec.to_builtins(shown.words),
        "next": shown.next.text,
        "acts": shown.next.actor,
        "within_seconds": shown.next.within_seconds,
        "commands": list(shown.next.commands),
        "ended": shown.view.ended,
        "unreachable": picture.unreachable,
    }
