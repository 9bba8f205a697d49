"""Counts what a case left in the databases and in the log, and names the invariants it breaks.

The names are those of `docs/design.md` section 3. Nothing here knows how a transaction is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from coordinator.model import Status
from tests.crash.matrix import ABORTED, COMMITTED, NOTHING, Case

OPENING_BALANCE = 100


class Books(msgspec.Struct, frozen=True):
    """What one database and the log hold of a case at one moment, by participant."""

    balance: dict[str, int]
    markers: dict[str, list[str]]
    """The transactions whose marker rows are visible on the case's account."""
    prepared: dict[str, list[str]]
    """The case's branches that are prepared, by their names."""
    locked: frozenset[str]
    """Participants in which somebody has a lock on the case's account."""
    verdict: str
    """What is recorded under the case's id, if anything."""
    named: frozenset[str]
    """The participants whose branches the record names."""
    status: Status


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of a case: what was told, and the books before and after recovery."""

    case: Case
    transaction: str
    hit: bool
    """The process said that it reached the point, and the fault was applied there."""
    said: tuple[str, ...]
    """All that the process said, for who reads a failure."""
    told: str
    """committed, aborted, unknown, heuristic; empty if the process never said."""
    told_transaction: str
    """The id that came with `unknown`."""
    late: bool
    """The caller waited for its deadline, and the process was not the one that slept."""
    left: bool
    """The process ended in an orderly way, and yet something in it had not ended."""
    repeat: tuple[str, str] | None
    """What the repeat under the key was told, and its own id or that of the first."""
    before: Books
    after: Books
    later: Books
    """After one more transfer on the same account."""


def violations(facts: Facts) -> list[str]:
    """What is wrong, each with the name of the invariant; empty if nothing is."""
    found = list(_violations(facts))
    return [*found, f"it said {facts.said}"] if found else []


def _violations(facts: Facts) -> Iterator[str]:
    if not facts.hit:
        yield "vacuous: the fault was never applied"
    yield from _before_recovery(facts)
    yield from _agreement(facts)
    yield from _acknowledgement(facts)
    yield from _completion(facts)


def outcome(facts: Facts) -> str:
    """What the branches show: committed when every writer's marker is there, aborted when none."""
    shown = [facts.transaction in facts.after.markers[each] for each in facts.case.writers]
    if all(shown):
        return COMMITTED
    return ABORTED if not any(shown) else "partial"


def _before_recovery(facts: Facts) -> Iterator[str]:
    """The rules that recovery could cover up: validity and the decision before phase two."""
    books, case = facts.before, facts.case
    ended = [each for each in case.writers if facts.transaction in books.markers[each]]
    if ended and case.is_recorded and books.verdict != "commit":
        yield f"I5: {ended} committed while the log held {books.verdict or 'nothing'}"
    if books.verdict == "commit":
        for each in case.writers:
            if each not in ended and not books.prepared[each]:
                yield f"I2: a commit stands, but {each} holds no branch"
        if unnamed := set(case.writers) - books.named:
            yield f"I2: a commit stands that does not name {sorted(unnamed)}"
    if books.verdict and books.verdict != facts.after.verdict:
        yield f"I3: the log held {books.verdict}, then {facts.after.verdict or 'nothing'}"


def _agreement(facts: Facts) -> Iterator[str]:
    case, books = facts.case, facts.after
    happened = outcome(facts)
    if happened == "partial":
        yield f"I1: markers of {facts.transaction} are {books.markers}"
    elif happened not in case.outcomes:
        yield f"outcome: {happened} instead of {' or '.join(sorted(case.outcomes))}"
    wanted = _wanted_markers(facts)
    for each, found in books.markers.items():
        expected = wanted if each in case.writers or facts.repeat is not None else []
        if sorted(found) != sorted(expected):
            yield f"I1: {each} has the markers {found} instead of {expected}"
        worth = OPENING_BALANCE + _moved(each, len(found))
        if books.balance[each] != worth:
            yield f"I1: {each} has {books.balance[each]} instead of {worth}"
    if case.is_recorded and (books.verdict == "commit") != (happened == COMMITTED):
        yield f"I1: {happened}, but the log holds {books.verdict or 'nothing'}"


def _wanted_markers(facts: Facts) -> list[str]:
    """Exactly one a branch and transaction that committed; under a key exactly one altogether."""
    first = [facts.transaction] if outcome(facts) == COMMITTED else []
    if facts.repeat is None:
        return first
    told, transaction = facts.repeat
    return [transaction] if told in (COMMITTED, "before") else first


def _moved(participant: str, times: int) -> int:
    return times * (-30 if participant == "accounts" else 30)


def _acknowledgement(facts: Facts) -> Iterator[str]:
    happened, told = outcome(facts), facts.told
    if told not in facts.case.told | {happened}:
        yield f"I4: told {told or NOTHING!r}, but it {happened}"
    if told == "unknown" and facts.told_transaction != facts.transaction:
        yield f"I4: told unknown with the id {facts.told_transaction!r}"
    before, after = facts.before.status, facts.after.status
    for told_by, status in ((told, before), (told, after), (happened, after)):
        denied = {COMMITTED: Status.ABORTED, ABORTED: Status.COMMITTED}.get(told_by)
        if status is denied:
            yield f"I4: told or seen {told_by}, but the status is {status}"
    if facts.case.is_recorded and happened == COMMITTED and after is not Status.COMMITTED:
        yield f"I4: committed, but the status is {after}"
    if before is not after and before is not Status.UNDECIDED:
        yield f"I11: the status was {before}, then {after}"
    if facts.repeat is not None:
        yield from _repeated(facts, *facts.repeat)


def _repeated(facts: Facts, told: str, transaction: str) -> Iterator[str]:
    expected = "before" if outcome(facts) == COMMITTED else COMMITTED
    if told != expected:
        yield f"I4: the repeat under the key was told {told!r} instead of {expected!r}"
    if (transaction == facts.transaction) != (told == "before"):
        yield f"I4: the repeat that was told {told!r} names {transaction}"


def _completion(facts: Facts) -> Iterator[str]:
    if facts.late:
        yield "I6: the caller was told only at the deadline"
    if facts.left:
        yield "I6: the process closed with the transaction unended"
    for moment, books in (("recovery", facts.after), ("the next transfer", facts.later)):
        if left := {each: gids for each, gids in books.prepared.items() if gids}:
            yield f"I6: prepared after {moment}: {left}"
        if books.locked:
            yield f"I6: locked after {moment}: {sorted(books.locked)}"
    for each, balance in facts.later.balance.items():
        if balance != facts.after.balance[each] + _moved(each, 1):
            yield f"I6: the next transfer did not reach {each}"


def of_the_whole(exit_code: int, left: dict[str, list[str]], foreign: Sequence[bool]) -> list[str]:
    """What is wrong with a batch: how recovery ended, branches of nobody, branches of others."""
    found = []
    if exit_code != 0:
        found.append(f"I6: recovery ended with {exit_code}")
    if orphans := {each: gids for each, gids in left.items() if gids}:
        found.append(f"I7: nobody knows the branches {orphans}")
    if not all(foreign):
        found.append("I8: a branch of another log was touched")
    return found
