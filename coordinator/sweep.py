"""What a sweep acts on and how far the horizon may rise. Pure: values in, values out.

The sweep is part of the protocol, not a repair tool: a PREPARE that lands after its ROLLBACK leaves
a branch that only a sweep can find. Everything decided here is about *when somebody should try*;
what happens to a transaction is decided by the log alone, so a wrong judgement costs work or time
and never agreement.

A round: observe the members, every resource and the unfinished records; then act on what was seen
in two rounds, is not driven by this process, and is not live. *Live* means undecided, its member
alive, and within its deadline by this sweeper's own monotonic clock from its first sight. What a
dead member left behind is acted on at first sight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import msgspec

from coordinator.log.base import Record, Resource
from coordinator.members.base import Beat
from coordinator.model import Branch, MemberId, TransactionId, id_floor
from coordinator.protocol import Phase


class Case(msgspec.Struct, frozen=True):
    """A transaction to drive to its end: the branches seen prepared, and its record if any."""

    transaction: TransactionId
    branches: tuple[Branch, ...]
    record: Record | None


class _Sighting(msgspec.Struct):
    first_seen: float
    rounds: int
    beats: dict[MemberId, int]
    """Each member's count when the transaction was first seen, or last published."""
    seconds_left: float | None = None
    """What its member published it had left, if it ever did."""
    published: bool = False


class Watch:
    """What one sweeper remembers from round to round.

    `timeout_max` is the longest deadline, in seconds, that a transaction of this cluster may have.
    """

    def __init__(self, timeout_max: float) -> None:
        self._timeout_max = timeout_max
        self._sightings: dict[TransactionId, _Sighting] = {}

    def judge(
        self,
        *,
        now: float,
        alive: Mapping[MemberId, Beat],
        seen: Iterable[Branch],
        records: Mapping[TransactionId, Record],
        driven_here: Collection[TransactionId],
    ) -> list[Case]:
        """One round: the cases to drive now, oldest first.

        `now` is this process's monotonic clock in seconds. `records` are those of the unfinished
        transactions, and those standing under the ids that were seen.
        """
        branches: dict[TransactionId, list[Branch]] = {}
        for branch in seen:
            branches.setdefault(branch.xid.transaction, []).append(branch)
        unfinished = {t for t, record in records.items() if not record.finished}
        open_here = (branches.keys() | unfinished) - set(driven_here)
        self._sightings = {
            transaction: self._sight(transaction, now, alive) for transaction in open_here
        }
        cases = []
        for transaction in sorted(open_here):
            found = tuple(branches.get(transaction, ()))
            record = records.get(transaction)
            if self._is_due(transaction, found, record, now, alive):
                cases.append(Case(transaction, found, record))
        return cases

    def _sight(
        self, transaction: TransactionId, now: float, alive: Mapping[MemberId, Beat]
    ) -> _Sighting:
        counts = {member: beat.count for member, beat in alive.items()}
        sighting = self._sightings.get(transaction)
        if sighting is None:
            sighting = _Sighting(now, 0, counts)
        sighting.rounds += 1
        seconds_left = _published_seconds_left(transaction, alive)
        sighting.published = seconds_left is not None
        if sighting.published:
            sighting.beats = counts
            if sighting.seconds_left is None:
                sighting.seconds_left = seconds_left
        return sighting

    def _is_due(
        self,
        transaction: TransactionId,
        branches: tuple[Branch, ...],
        record: Record | None,
        now: float,
        alive: Mapping[MemberId, Beat],
    ) -> bool:
        sighting = self._sightings[transaction]
        owners = owners_of(branches, record)
        if not owners & alive.keys():
            return True
        if sighting.rounds < 2:
            return False
        return record is not None or not self._is_live(transaction, owners, now, alive)

    def _is_live(
        self,
        transaction: TransactionId,
        owners: set[MemberId],
        now: float,
        alive: Mapping[MemberId, Beat],
    ) -> bool:
        sighting = self._sightings[transaction]
        limit = self._timeout_max if sighting.seconds_left is None else sighting.seconds_left
        if now - sighting.first_seen >= limit:
            return False
        # A member publishes what it drives once that is older than a second. Three beats that do
        # not list the transaction, all later than the sight, say that its member has ended it.
        beats = [
            alive[owner].count - sighting.beats.get(owner, 0) for owner in owners & alive.keys()
        ]
        return sighting.published or min(beats) < 3


def owners_of(branches: tuple[Branch, ...], record: Record | None) -> set[MemberId]:
    """Who prepared the branches that were seen, or, where none was, those that the record names."""
    named = () if record is None else record.decision.named
    return {branch.xid.member for branch in branches or named}


def _published_seconds_left(
    transaction: TransactionId, alive: Mapping[MemberId, Beat]
) -> float | None:
    for beat in alive.values():
        for in_flight in beat.in_flight:
            if in_flight.transaction == transaction:
                return in_flight.seconds_left
    return None


def clear_mark(
    *,
    scan_began_ms: int,
    retention_ms: int,
    alive: Mapping[MemberId, Beat],
    seen: Iterable[Branch],
    records: Mapping[TransactionId, Record],
) -> TransactionId:
    """Up to which id a completed scan of one resource saw nothing that still needs a decision.

    A transaction younger than half the retention, which is longer than any deadline, may prepare
    after the scan, and so may one that a member drove before it: a resource that then goes away
    must not count as clear of them. Named branches of unfinished commits do not count: their
    records stay, each by itself, so one dead database never holds up forgetting.
    """
    clear = min([id_floor(scan_began_ms - retention_ms // 2), *_undecided(alive)])
    for branch in seen:
        record = records.get(branch.xid.transaction)
        named = record.decision.branches if record is not None else ()
        if all(branch.id != each.id for each in named):
            clear = min(clear, branch.xid.transaction)
    return clear


def horizon_candidate(
    *,
    retention_ms: int,
    absence_limit_ms: int,
    now_ms: int,
    alive: Mapping[MemberId, Beat],
    newest_seen: TransactionId,
    resources: Iterable[Resource],
) -> TransactionId:
    """How far the horizon may rise now; the log refuses to lower it.

    It stays the retention behind the smallest clock of the live members, below the newest id seen,
    below what is known to be in flight and undecided, and below what each resource's last sweep saw
    clear, unless that resource has been away for longer than `absence_limit_ms`.
    """
    slowest_ms = min([beat.clock_ms for beat in alive.values()] + [now_ms])
    bounds = [id_floor(slowest_ms - retention_ms), newest_seen]
    bounds += _undecided(alive)
    bounds += [
        resource.clear
        for resource in resources
        if slowest_ms - resource.swept_ms <= absence_limit_ms
    ]
    return min(bounds)


def _undecided(alive: Mapping[MemberId, Beat]) -> list[TransactionId]:
    """What living members drive and may still decide; a commit's record stays by itself."""
    return [
        flight.transaction
        for beat in alive.values()
        for flight in beat.in_flight
        if flight.phase != Phase.COMMITTING
    ]
