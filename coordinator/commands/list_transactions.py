"""`syncpoint list`: the transactions in flight and in doubt, by what everybody says of them.

The members say what they drive, each participant which branches it really holds, the log what is
unfinished and what needs a person. Nothing is driven and nothing changed. What ends while they are
asked, one after the other, may still be shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from enum import StrEnum

import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coordinator.commands.output import messages, print_json, results
from coordinator.coordinator import Coordinator
from coordinator.engine import PUBLISHED_AFTER_SECONDS, Engine, now_ms
from coordinator.errors import ConfigurationError, one_line
from coordinator.log.base import Incident, Log, Record, Unreadable, Word, every_record
from coordinator.members.base import Beat, InFlight
from coordinator.model import Branch, MemberId, TransactionId, Verdict, Xid, id_time_ms
from coordinator.recovery import read_one, scan_participants

ROWS_MAX = 50
ENDED = frozenset({"ended", "gone"})


class State(StrEnum):
    """Who has to do something about a transaction: its owner, recovery, a person, or nobody."""

    IN_FLIGHT = "in-flight"
    IN_DOUBT = "in-doubt"
    NEEDS_PERSON = "needs-person"
    FINISHED = "finished"


class BranchView(msgspec.Struct, frozen=True):
    """A branch as its participant and the record tell.

    `state`: working (its owner says so), prepared (the participant holds it), ended (the record
    says so), gone (the record does not say so yet, but the participant holds it no more),
    unreachable, not configured, undecided (a last resource), quarantined, or a heuristic ending.
    """

    participant: str
    state: str
    branch: str = ""
    evidence: str = ""


class View(msgspec.Struct, frozen=True):
    """One transaction. `owner` is the member that began it, empty when nothing tells who it was.

    `seconds_left` are those to its deadline, where its owner has published them.
    """

    transaction: TransactionId
    age_seconds: float
    state: State
    phase: str
    branches: list[BranchView]
    owner: str
    owner_alive: bool
    seconds_left: float | None = None
    why_unreadable: str = ""

    @property
    def ended(self) -> int:
        return sum(branch.state in ENDED for branch in self.branches)


class Picture(msgspec.Struct):
    """What everybody `configured` said; `unreachable` are participants that did not, and why.

    `services` is how many members live beside this process. `incidents` and `words`, those of
    people, are by the transaction that they are about.
    """

    views: list[View]
    records: Mapping[TransactionId, Record]
    held: Mapping[TransactionId, list[Branch]]
    incidents: Mapping[TransactionId, list[Incident]]
    words: Mapping[TransactionId, list[Word]]
    configured: Collection[str]
    unreachable: Mapping[str, str]
    services: int

    def answered(self, participant: str) -> bool:
        """Whether it has told what it holds."""
        return participant in self.configured and participant not in self.unreachable

    def view(self, transaction: TransactionId) -> View | None:
        return next((each for each in self.views if each.transaction == transaction), None)


class _Found(msgspec.Struct):
    """The raw answers."""

    configured: Collection[str]
    unreachable: Mapping[str, str]
    alive: Mapping[MemberId, Beat] = msgspec.field(default_factory=dict)
    held: dict[TransactionId, list[Branch]] = msgspec.field(default_factory=dict)
    records: dict[TransactionId, Record] = msgspec.field(default_factory=dict)
    unreadable: dict[TransactionId, str] = msgspec.field(default_factory=dict)
    incidents: dict[TransactionId, list[Incident]] = msgspec.field(default_factory=dict)
    words: dict[TransactionId, list[Word]] = msgspec.field(default_factory=dict)
    in_flight: dict[TransactionId, tuple[MemberId, InFlight]] = msgspec.field(default_factory=dict)


def parse_state(text: str | None) -> State | None:
    """The state that a filter names; raises `ConfigurationError` with those that there are."""
    try:
        return None if text is None else State(text)
    except ValueError as error:
        raise ConfigurationError(f"--state {text}: use one of {', '.join(State)}") from error


def run(coordinator: Coordinator, *, everything: bool, state: State | None, as_json: bool) -> int:
    """Look, tell, and return the exit code, which is 0."""
    picture = asyncio.run(look_once(coordinator, everything or state is State.FINISHED))
    views = [
        each
        for each in picture.views
        if (state is None or each.state is state) and (everything or not _is_passing(each))
    ]
    if as_json:
        plain = [msgspec.to_builtins(view) | {"ended": view.ended} for view in views]
        print_json({"transactions": plain, "unreachable": picture.unreachable})
    else:
        _show(views, results())
    tell_unreachable(picture)
    return 0


def _is_passing(view: View) -> bool:
    """A busy service always has some of these, and ends them by itself."""
    return view.state is State.IN_FLIGHT and view.age_seconds < PUBLISHED_AFTER_SECONDS


def tell_unreachable(picture: Picture) -> None:
    """A line on stderr for each participant whose branches are not known."""
    for name, why in sorted(picture.unreachable.items()):
        line = f"participant {name} cannot be reached, so what it holds is not shown: {why}"
        messages().print(escape(f"syncpoint: {one_line(line)}"), soft_wrap=True)


async def look_once(coordinator: Coordinator, finished_too: bool) -> Picture:
    """Open the coordinator, `look`, and close it again."""
    await coordinator.open(sweep=False, tolerate_unreachable=True)
    try:
        return await look(coordinator, finished_too=finished_too)
    finally:
        await coordinator.close()


async def look(
    coordinator: Coordinator,
    *,
    finished_too: bool = False,
    also: TransactionId | None = None,
) -> Picture:
    """Ask everybody; transactions oldest first, with `also` whatever its state, if it is known.

    The coordinator is open without a sweep. Raises `LogUnavailable`.
    """
    engine = coordinator.engine()
    found = _Found({each.name for each in coordinator.participants}, coordinator.unreachable)
    # In this order: what a participant holds is judged by what was recorded since, and an owner
    # that is not there at last is dead, and not just starting.
    await _ask_participants(engine, found)
    await _scan_log(engine.log, found, finished_too)
    await _ask_members(engine, found)
    if finished_too or also:
        await _read_words(engine.log, found, None if finished_too else also)
    await _read_others(engine.log, found, also)
    known = (
        found.held.keys() | found.records.keys() | found.unreadable.keys()
        | found.incidents.keys() | found.in_flight.keys() | found.words.keys()
    )  # fmt: skip
    views = [_view(transaction, found) for transaction in sorted(known)]
    wanted = [
        view
        for view in views
        if finished_too or view.state is not State.FINISHED or view.transaction == also
    ]
    services = len(found.alive.keys() - {engine.member})
    return Picture(
        wanted,
        found.records,
        found.held,
        found.incidents,
        found.words,
        found.configured,
        found.unreachable,
        services,
    )


async def _ask_participants(engine: Engine, found: _Found) -> None:
    scans, failures = await scan_participants(engine)
    found.unreachable = {**found.unreachable, **failures}
    for branches in scans.values():
        for branch in branches:
            found.held.setdefault(branch.xid.transaction, []).append(branch)


async def _scan_log(log: Log, found: _Found, finished_too: bool) -> None:
    for incident in await log.incidents():
        xid = Xid.parse(incident.gid)
        if xid is not None:
            found.incidents.setdefault(xid.transaction, []).append(incident)
    async for record in every_record(log, unfinished_only=not finished_too):
        if isinstance(record, Unreadable):
            found.unreadable[record.transaction] = record.why
        else:
            found.records[record.transaction] = record


async def _read_words(log: Log, found: _Found, only: TransactionId | None) -> None:
    for word in await log.words():
        xid = Xid.parse(word.subject)
        about = TransactionId(word.subject) if xid is None else xid.transaction
        if only is None or about == only:
            found.words.setdefault(about, []).append(word)


async def _ask_members(engine: Engine, found: _Found) -> None:
    found.alive = await engine.members.alive()
    for member, beat in found.alive.items():
        found.in_flight.update({each.transaction: (member, each) for each in beat.in_flight})


async def _read_others(log: Log, found: _Found, also: TransactionId | None) -> None:
    """What stands under the ids that others than the log have named."""
    named = found.held.keys() | found.in_flight.keys() | found.incidents.keys()
    for transaction in named | ({also} if also else set()):
        if transaction not in found.records and transaction not in found.unreadable:
            standing = await read_one(log, transaction)
            if isinstance(standing, Unreadable):
                found.unreadable[transaction] = standing.why
            elif standing is not None:
                found.records[transaction] = standing


def _view(transaction: TransactionId, found: _Found) -> View:
    record = found.records.get(transaction)
    incidents = {each.gid: each for each in found.incidents.get(transaction, ())}
    driver, flight = found.in_flight.get(transaction, (None, None))
    named = () if record is None else record.decision.named
    held = found.held.get(transaction, [])
    members = [branch.xid.member for branch in (*named, *held)]
    members += [xid.member for xid in map(Xid.parse, incidents) if xid is not None]
    owner = members[0] if members else driver
    owner_alive = owner in found.alive
    # Without a record, what only a person's word tells of has ended long ago.
    ended = record.finished if record else not (held or incidents or flight)
    # What the record of a finished transaction names was seen a moment before it ended.
    left = [each for each in held if not ended or each not in named]
    if incidents or transaction in found.unreadable:
        state = State.NEEDS_PERSON
    elif ended and not left:
        state = State.FINISHED
    else:
        state = State.IN_FLIGHT if driver or owner_alive else State.IN_DOUBT
    return View(
        transaction,
        max(now_ms() - id_time_ms(transaction), 0) / 1000,
        state,
        _phase(transaction, found, bool(left)),
        _branches(record, left, incidents, flight, found),
        owner or "",
        owner_alive,
        None if flight is None else flight.seconds_left,
        found.unreadable.get(transaction, ""),
    )


def _phase(transaction: TransactionId, found: _Found, left: bool) -> str:
    if transaction in found.unreadable:
        return "unreadable"
    record = found.records.get(transaction)
    if record is None:
        flight = found.in_flight.get(transaction)
        if flight is not None:
            return flight[1].phase
        return "prepared" if left or transaction in found.incidents else "forgotten"
    verdict = record.answer or record.decision.verdict
    if verdict is Verdict.DELEGATED:
        return "delegated"
    if verdict is Verdict.COMMIT:
        return "committed" if record.finished and not left else "committing"
    return "rolling back" if left else "aborted"


def _branches(
    record: Record | None,
    held: list[Branch],
    incidents: dict[str, Incident],
    flight: InFlight | None,
    found: _Found,
) -> list[BranchView]:
    views: dict[str, BranchView] = {}
    for branch in () if record is None else record.decision.named:
        assert record is not None
        state = _state_of_named(branch, record, found)
        views[str(branch.xid)] = BranchView(branch.participant, state, branch.id)
    for branch in held:
        views[str(branch.xid)] = BranchView(branch.participant, "prepared", branch.id)
    for gid, incident in incidents.items():
        xid = Xid.parse(gid)
        state = "quarantined" if incident.kind is None else str(incident.kind)
        branch_id = "" if xid is None else xid.branch
        views[gid] = BranchView(incident.participant, state, branch_id, incident.evidence)
    known = {each.participant for each in views.values()}
    working = [] if flight is None else [name for name in flight.branches if name not in known]
    # With a record, what is not named was read only, and has ended with the vote.
    told = "working" if record is None else "ended"
    every = [*views.values(), *(BranchView(name, told) for name in working)]
    return sorted(every, key=lambda each: (each.participant, each.branch))


def _state_of_named(branch: Branch, record: Record, found: _Found) -> str:
    if branch.id in record.ended:
        return "ended"
    if branch == record.decision.last_resource:
        return "ended" if record.answer else "undecided"
    if branch.participant not in found.configured:
        return "not configured"
    return "unreachable" if branch.participant in found.unreachable else "gone"


def _show(views: list[View], console: Console) -> None:
    if not views:
        console.print("No transaction is in flight, in doubt, or otherwise to be shown.")
        return
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("transaction, owner", overflow="fold", min_width=len(views[0].transaction))
    for heading in ("age", "state, phase"):
        table.add_column(heading, no_wrap=True)
    table.add_column("branches", overflow="fold")
    for view in views[:ROWS_MAX]:
        table.add_row(
            f"{view.transaction}\n{shown_owner(view)}",
            shown_age(view.age_seconds),
            f"{view.state}\n{view.phase}",
            escape(_shown_branches(view)),
            end_section=True,
        )
    console.print(table)
    if len(views) > ROWS_MAX:
        console.print(f"... and {len(views) - ROWS_MAX} younger; --json shows them all")
    if any(view.state is State.NEEDS_PERSON for view in views):
        console.print("What needs a person: `syncpoint show ID` says why, and what to type.")


def _shown_branches(view: View) -> str:
    lines = [f"{each.participant} {each.state}" for each in view.branches]
    return "\n".join([*lines, f"{view.ended} of {len(lines)} ended"]) if lines else "none known"


def shown_owner(view: View) -> str:
    """The owner, alive or dead, for people."""
    if not view.owner:
        return "owner unknown"
    return f"owner {view.owner} {'alive' if view.owner_alive else 'dead'}"


def shown_age(seconds: float) -> str:
    """An age for people, in the largest unit of which there are two."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s"
