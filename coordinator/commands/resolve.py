"""`syncpoint resolve`: a person ends what waits, where the log allows it.

A whole transaction can only be proposed for abort, and what stands is obeyed. One quarantined
branch is ended by a person's word, which is recorded before the branch is touched, once and for
ever. With `--dry-run` the same questions are asked and nothing is changed.
"""

from __future__ import annotations

import asyncio
import re

import msgspec
from rich.markup import escape

from coordinator.commands.next_step import forget_command
from coordinator.commands.output import messages, print_json, results
from coordinator.commands.show import parse_id
from coordinator.commands.words import read_reason, said_now, shown_word
from coordinator.coordinator import Coordinator
from coordinator.engine import Engine
from coordinator.errors import ConfigurationError, TransactionError, one_line
from coordinator.log.base import Incident, Log, Proposal, Record, Stands, Unreadable, Word
from coordinator.model import (
    ABORT,
    Branch,
    BranchId,
    Ending,
    EndingKind,
    TransactionId,
    Verdict,
    Xid,
)
from coordinator.participant import Participant
from coordinator.protocol import Phase
from coordinator.recovery import read_one, scan_participants
from coordinator.sweep import Case

EXIT_RESOLVED = 0
EXIT_LEFT = 3
EXIT_REFUSED = 4

_BRANCH = re.compile("[0-9a-f]{16}")
_OF_BRANCH = {"commit": Verdict.COMMIT, "rollback": Verdict.ABORT}


class Order(msgspec.Struct, frozen=True):
    """What a person asks for. `branch` None is the whole transaction, which can only abort."""

    transaction: TransactionId
    verb: str
    branch: BranchId | None
    reason: str
    dry_run: bool = False

    @property
    def verdict(self) -> Verdict:
        return _OF_BRANCH.get(self.verb, Verdict.ABORT)


class Resolution(msgspec.Struct, frozen=True):
    """What came of it: `said` is done, or would be, `left` is not done yet."""

    said: str
    branches: list[Branch] = []
    left: str = ""
    ending: Ending | None = None
    word: Word | None = None


class Refusal(Exception):
    """What was asked for contradicts what stands. Nothing was done."""


def read_order(
    transaction: str, verb: str, branch: str | None, reason: str, *, dry_run: bool = False
) -> Order:
    """Raises `ConfigurationError` for what cannot be meant."""
    transaction_id = parse_id(transaction)
    reason = read_reason(reason)
    if branch is None and verb != "abort":
        raise ConfigurationError(
            f"resolve {verb}: a transaction can only be proposed for abort, since a commit needs "
            "the votes of all its branches; to end one quarantined branch, add --branch B"
        )
    if branch is not None and verb not in _OF_BRANCH:
        raise ConfigurationError(f"resolve --branch {branch} {verb}: write commit or rollback")
    if branch is not None and not _BRANCH.fullmatch(branch):
        raise ConfigurationError(
            f"--branch {branch}: write its sixteen hexadecimal digits, as `syncpoint show "
            f"{transaction_id}` tells them"
        )
    branch_id = None if branch is None else BranchId(branch)
    return Order(transaction_id, verb, branch_id, reason, dry_run)


def run(coordinator: Coordinator, order: Order, *, as_json: bool) -> int:
    """Do it, tell what came of it, and return the exit code."""
    refused, resolution = "", Resolution("")
    try:
        resolution = asyncio.run(_resolve(coordinator, order))
    except Refusal as refusal:
        refused = one_line(refusal)
    code = EXIT_REFUSED if refused else EXIT_LEFT if resolution.left else EXIT_RESOLVED
    if as_json:
        print_json(_as_plain(order, resolution, refused, code))
    elif resolution.said:
        would = "dry run, nothing was changed: " if order.dry_run else ""
        results().print(escape(would + resolution.said), soft_wrap=True)
    for line in filter(None, (refused, resolution.left)):
        messages().print(escape(f"syncpoint: {one_line(line)}"), soft_wrap=True)
    return code


async def _resolve(coordinator: Coordinator, order: Order) -> Resolution:
    await coordinator.open(sweep=False, tolerate_unreachable=True)
    try:
        if order.branch is None:
            return await _abort(coordinator, order)
        return await _end_branch(coordinator, order)
    finally:
        await coordinator.close()


async def _standing(log: Log, transaction: TransactionId) -> Record | None:
    standing = await read_one(log, transaction)
    if isinstance(standing, Unreadable):
        raise Refusal(
            f"the record of {transaction} cannot be read: {standing.why}; run a version of "
            "syncpoint that can, or restore the log from its backup"
        )
    return standing


# A whole transaction.


async def _abort(coordinator: Coordinator, order: Order) -> Resolution:
    engine = coordinator.engine()
    standing = await _standing(engine.log, order.transaction)
    word = None
    if standing is None:
        await _refuse_below_horizon(engine.log, order.transaction)
        if not order.dry_run:
            word = said_now(order.transaction, Verdict.ABORT, order.reason)
            word = await engine.log.give_word(word)
            standing = await _propose_abort(engine.log, order.transaction)
    if standing is not None:
        _refuse_unless_aborted(standing)
    scans, away = await scan_participants(engine)
    away = {**coordinator.unreachable, **away}
    held = [
        branch
        for branches in scans.values()
        for branch in branches
        if branch.xid.transaction == order.transaction
    ]
    left = "" if order.dry_run else await _roll_back(engine, order.transaction, held)
    for name, why in sorted(away.items()):
        left = left or (
            f"participant {name} cannot be reached: {why}; what it holds of {order.transaction} is "
            "rolled back by the sweep of a service, or by `syncpoint recover`"
        )
    names = ", ".join(sorted(branch.participant for branch in held))
    abort = "would be proposed" if standing is None else "stands"
    done = "to be rolled back" if order.dry_run or left else "rolled back"
    ended = f"{done} in {names}" if names else "nothing of it is prepared"
    said = f"transaction {order.transaction}: abort {abort}; {ended}"
    return Resolution(said, held, left, word=word)


async def _refuse_below_horizon(log: Log, transaction: TransactionId) -> None:
    if transaction < (await log.read(transaction)).horizon:
        raise Refusal(
            f"the log has forgotten transactions as old as {transaction}, so its outcome cannot be "
            f"decided any more: compare the databases, then end each branch that `syncpoint show "
            f"{transaction}` tells with --branch B commit, or --branch B rollback"
        )


async def _propose_abort(log: Log, transaction: TransactionId) -> Record:
    answer = await log.propose(Proposal(transaction, ABORT))
    if isinstance(answer, Stands):
        return answer.record
    await _refuse_below_horizon(log, transaction)
    raise TransactionError(f"the log answers {answer} to an abort of {transaction}")


def _refuse_unless_aborted(record: Record) -> None:
    if record.unresolved:
        last = record.decision.last_resource
        raise Refusal(
            f"the decision on {record.transaction} is delegated to its last resource, "
            f"{last and last.participant}, which has not answered yet: the sweep asks it, or "
            "`syncpoint recover`"
        )
    if (record.answer or record.decision.verdict) is Verdict.COMMIT:
        raise Refusal(
            f"a commit stands for {record.transaction}, and nobody can undo it: the sweep of a "
            "service commits it everywhere, or `syncpoint recover` does it now"
        )


async def _roll_back(engine: Engine, transaction: TransactionId, held: list[Branch]) -> str:
    """As the sweep would; returns what could not be done, or nothing."""
    if not held:
        return ""
    driver = await engine.recover(Case(transaction, tuple(held), None))
    if driver.core.phase is Phase.ENDED:
        return ""
    why = "; ".join(driver.left) or driver.broken or f"left while {driver.core.phase}"
    return f"{why}; the sweep of a service tries again, or `syncpoint recover`"


# One quarantined branch.


async def _end_branch(coordinator: Coordinator, order: Order) -> Resolution:
    engine = coordinator.engine()
    standing = await _standing(engine.log, order.transaction)
    incident = await _quarantined(engine.log, order)
    xid = Xid.parse(incident.gid)
    assert xid is not None
    if standing is not None:
        _refuse_against_record(standing, order)
    participant = _participant(coordinator, incident.participant)
    await _refuse_unless_held(engine, xid, participant.name)
    against = await _other_words(engine.log, incident.gid, order)
    where = f"branch {xid.branch} of {participant.name}"
    branch = Branch(xid, participant.name)
    if order.dry_run:
        return Resolution(f"{where} would be ended by {order.verb}{against}", [branch])
    word = await engine.log.give_word(said_now(incident.gid, order.verdict, order.reason))
    _refuse_against_word(word, order)
    ending = await _end(participant, branch, order)
    await engine.log.acknowledge(incident.gid)
    how = f"ended by {order.verb}, as {word.by} ordered"
    if ending.kind is not EndingKind.FINISHED:
        how = f"{order.verb} was ordered by {word.by}, and it ended otherwise: {ending.kind}"
    evidence = f" ({ending.evidence})" if ending.evidence else ""
    return Resolution(f"{where}: {how}{evidence}{against}", [branch], "", ending, word)


async def _other_words(log: Log, gid: str, order: Order) -> str:
    """What people said of the other branches, where it disagrees; refuses another word of this."""
    against = ""
    for word in await log.words():
        xid = Xid.parse(word.subject)
        if xid is None or xid.transaction != order.transaction:
            continue
        if word.subject == gid:
            _refuse_against_word(word, order)
        elif word.verdict not in (None, order.verdict):
            against += f"; it disagrees with what a person said before: {shown_word(word)}"
    return against


async def _quarantined(log: Log, order: Order) -> Incident:
    what = f"branch {order.branch} of transaction {order.transaction}"
    for incident in await log.incidents():
        xid = Xid.parse(incident.gid)
        if xid is None or (xid.transaction, xid.branch) != (order.transaction, order.branch):
            continue
        if incident.kind is None:
            return incident
        raise Refusal(
            f"{what} has ended already, a {incident.kind}: mend the databases by hand, then "
            f"acknowledge it with `{forget_command(order.transaction)}`"
        )
    raise Refusal(
        f"{what} is not quarantined: as long as the log can decide, only the log does. "
        f"`syncpoint show {order.transaction}` tells what happens next"
    )


def _refuse_against_record(record: Record, order: Order) -> None:
    verdict = record.answer or record.decision.verdict
    named = any(branch.id == order.branch for branch in record.decision.branches)
    allowed = Verdict.ABORT if verdict is Verdict.COMMIT and not named else verdict
    if allowed is not order.verdict:
        stands = str(verdict) if named or verdict is not Verdict.COMMIT else "commit without it"
        raise Refusal(
            f"{order.verb} of branch {order.branch} contradicts the record of "
            f"{order.transaction}, in which stands: {stands}; ask for what stands"
        )


def _refuse_against_word(word: Word, order: Order) -> None:
    if word.verdict is not order.verdict:
        raise Refusal(
            f"another word stands already for branch {order.branch}: {shown_word(word)}; a word is "
            "given once, and only the same can be asked for again"
        )


def _participant(coordinator: Coordinator, name: str) -> Participant:
    participant = coordinator.engine().participants.get(name)
    if participant is not None:
        return participant
    why = coordinator.unreachable.get(name)
    problem = "is not configured here" if why is None else f"cannot be reached: {one_line(why)}"
    raise TransactionError(
        f"participant {name} {problem}; nothing was recorded: run it again where it can be reached"
    )


async def _refuse_unless_held(engine: Engine, xid: Xid, name: str) -> None:
    scans, away = await scan_participants(engine)
    if name in away:
        raise TransactionError(
            f"participant {name} cannot be reached: {one_line(away[name])}; nothing was recorded: "
            "run it again once it can"
        )
    if all(branch.xid != xid for branch in scans[name]):
        raise Refusal(
            f"branch {xid.branch} is not prepared in {name} any more: compare the databases, then "
            f"acknowledge it with `{forget_command(xid.transaction)}`"
        )


async def _end(participant: Participant, branch: Branch, order: Order) -> Ending:
    end = participant.commit if order.verdict is Verdict.COMMIT else participant.rollback
    try:
        return await end(branch)
    except Exception as error:
        raise TransactionError(
            f"{participant.name} did not end branch {branch.id}: {one_line(error)}; the word is "
            "recorded: run the same command again"
        ) from error


def _as_plain(order: Order, resolution: Resolution, refused: str, code: int) -> dict[str, object]:
    return {
        "transaction": order.transaction,
        "branch": order.branch,
        "asked": order.verb,
        "dry_run": order.dry_run,
        "refused": refused,
        "said": resolution.said,
        "branches": [
            {"participant": each.participant, "branch": each.id} for each in resolution.branches
        ],
        "left": resolution.left,
        "ending": msgspec.to_builtins(resolution.ending),
        "word": msgspec.to_builtins(resolution.word),
        "exit_code": code,
    }
