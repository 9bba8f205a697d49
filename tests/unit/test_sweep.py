"""The pure rules of the sweep: what a scan leaves clear, and how far the horizon may rise."""

from __future__ import annotations

from coordinator.log.base import Record, Resource
from coordinator.members.base import Beat, InFlight
from coordinator.model import (
    ABORT,
    Branch,
    BranchId,
    Decision,
    LogId,
    MemberId,
    TransactionId,
    Verdict,
    Xid,
    id_floor,
)
from coordinator.sweep import clear_mark, horizon_candidate

MEMBER = MemberId("a" * 16)
SCAN_MS = 1_000_000
RETENTION_MS = 100
CLEAR = id_floor(SCAN_MS - 50)
OLD = id_floor(SCAN_MS - 500)


def branch(transaction: TransactionId, number: int) -> Branch:
    return Branch(Xid(LogId("c" * 16), MEMBER, transaction, BranchId(f"{number:016x}")), "accounts")


def mark_after(
    seen: list[Branch],
    record: Record | None = None,
    alive: dict[MemberId, Beat] | None = None,
) -> TransactionId:
    records = {} if record is None else {record.transaction: record}
    return clear_mark(
        scan_began_ms=SCAN_MS,
        retention_ms=RETENTION_MS,
        alive=alive or {},
        seen=seen,
        records=records,
    )


def test_a_scan_that_sees_nothing_is_clear_of_what_can_prepare_no_more() -> None:
    """Who is younger than half the retention may prepare after the scan."""
    assert mark_after([]) == CLEAR


def test_what_a_member_drives_undecided_may_still_prepare() -> None:
    for phase, mark in (("preparing", OLD), ("rolling back", OLD), ("committing", CLEAR)):
        beat = Beat(SCAN_MS, 1, [InFlight(OLD, 1.0, phase)])
        assert mark_after([], alive={MEMBER: beat}) == mark


def test_a_branch_without_a_record_holds_the_mark_back() -> None:
    assert mark_after([branch(id_floor(SCAN_MS - 10), 1), branch(OLD, 2)]) == OLD


def test_a_named_branch_of_a_commit_does_not() -> None:
    """Its record stays by itself, so one dead database never holds up forgetting."""
    named = branch(OLD, 1)
    record = Record(OLD, Decision(Verdict.COMMIT, (named,)))
    assert mark_after([named], record) == CLEAR


def test_a_branch_that_the_commit_does_not_name_does() -> None:
    record = Record(OLD, Decision(Verdict.COMMIT, (branch(OLD, 1),)))
    assert mark_after([branch(OLD, 2)], record) == OLD


def test_a_branch_of_a_recorded_abort_does() -> None:
    assert mark_after([branch(OLD, 1)], Record(OLD, ABORT)) == OLD


def candidate(
    *,
    clock_ms: int = SCAN_MS,
    newest: TransactionId | None = None,
    flying: TransactionId | None = None,
    phase: str = "preparing",
    clear: TransactionId | None = None,
    swept_ms: int = SCAN_MS,
) -> TransactionId:
    flights = [] if flying is None else [InFlight(flying, 1.0, phase)]
    mark = id_floor(SCAN_MS) if clear is None else clear
    return horizon_candidate(
        retention_ms=RETENTION_MS,
        absence_limit_ms=10_000,
        now_ms=SCAN_MS,
        alive={MEMBER: Beat(clock_ms, 1, flights)},
        newest_seen=id_floor(SCAN_MS) if newest is None else newest,
        resources=[Resource("accounts", "an identity", mark, swept_ms)],
    )


def test_the_horizon_stays_behind_each_of_its_bounds() -> None:
    assert candidate() == id_floor(SCAN_MS - 100)
    assert candidate(clock_ms=SCAN_MS - 300) == id_floor(SCAN_MS - 400)
    assert candidate(newest=OLD) == OLD
    assert candidate(flying=OLD) == OLD
    decided = candidate(flying=OLD, phase="committing")
    assert decided == candidate(), "a database that is dead for hours holds up no forgetting"
    assert candidate(clear=OLD) == OLD


def test_a_resource_that_stays_away_for_too_long_is_waited_for_no_more() -> None:
    assert candidate(clear=OLD, swept_ms=SCAN_MS - 10_000) == OLD
    assert candidate(clear=OLD, swept_ms=SCAN_MS - 10_001) == id_floor(SCAN_MS - 100)


def test_absence_is_measured_by_the_smallest_clock() -> None:
    """A sweeper whose clock runs ahead must not take a resource for absent."""
    behind = SCAN_MS - 5_000
    assert candidate(clear=OLD, swept_ms=behind - 10_000, clock_ms=behind) == min(
        OLD, id_floor(behind - 100)
    )
    long_ago = id_floor(behind - 5_000)
    assert candidate(clear=long_ago, swept_ms=behind - 10_000, clock_ms=behind) == long_ago
