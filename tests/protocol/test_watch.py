"""Each test pins a sentence about what a sweep acts on, and when."""

from __future__ import annotations

from coordinator.log.base import Record
from coordinator.members.base import Beat, InFlight
from coordinator.model import ABORT, MemberId, TransactionId
from coordinator.sweep import Watch
from tests.protocol.values import ID, A, commit

OWNER = A.xid.member
TIMEOUT_MAX = 10.0


def judged(
    watch: Watch,
    now: float,
    *,
    beats: int | None = 1,
    left: float | None = None,
    record: Record | None = None,
) -> list[TransactionId]:
    """One round that sees branch A; `beats` None: its member is dead. What is then driven."""
    flights = [] if left is None else [InFlight(ID, left, "preparing")]
    alive: dict[MemberId, Beat] = {}
    if beats is not None:
        alive[OWNER] = Beat(0, beats, flights)
    cases = watch.judge(
        now=now,
        alive=alive,
        seen=[A],
        records={} if record is None else {ID: record},
        driven_here=(),
    )
    return [case.transaction for case in cases]


def test_it_acts_on_what_it_saw_twice() -> None:
    """It acts on what it saw twice, even where nothing speaks for waiting."""
    watch = Watch(0.0)
    assert judged(watch, 0.0) == []
    assert judged(watch, 0.1) == [ID]


def test_what_was_gone_in_between_was_not_seen_twice() -> None:
    watch = Watch(0.0)
    assert judged(watch, 0.0) == []
    watch.judge(now=0.1, alive={}, seen=[], records={}, driven_here=())
    assert judged(watch, 0.2) == []


def test_what_a_dead_member_left_is_acted_on_at_once() -> None:
    """A dead member is acted on at once."""
    assert judged(Watch(TIMEOUT_MAX), 0.0, beats=None) == [ID]


def test_a_standing_record_is_acted_on_at_once() -> None:
    """A standing record is acted on at once: at the second sight, however long its member may."""
    for record in (Record(ID, commit(A)), Record(ID, ABORT)):
        watch = Watch(TIMEOUT_MAX)
        assert judged(watch, 0.0, left=5.0, record=record) == []
        assert judged(watch, 0.1, left=4.9, record=record) == [ID]


def test_it_is_live_until_its_deadline_by_the_own_clock_from_first_sight() -> None:
    """Within its deadline by the sweeper's own monotonic clock from its first sight."""
    watch = Watch(TIMEOUT_MAX)
    assert judged(watch, 100.0, left=5.0) == []
    assert judged(watch, 104.9, left=5.0) == []  # whatever the member says now
    assert judged(watch, 105.0, left=5.0) == [ID]


def test_what_is_never_published_is_live_for_the_longest_deadline() -> None:
    watch = Watch(TIMEOUT_MAX)
    assert judged(watch, 0.0) == []
    assert judged(watch, TIMEOUT_MAX - 0.1) == []
    assert judged(watch, TIMEOUT_MAX) == [ID]


def test_three_beats_without_it_say_that_its_member_has_ended_it() -> None:
    """A member that beats and no longer lists a transaction has ended it."""
    watch = Watch(TIMEOUT_MAX)
    assert judged(watch, 0.0, beats=4) == []
    assert judged(watch, 0.2, beats=6) == []
    assert judged(watch, 0.3, beats=7) == [ID]


def test_what_this_process_drives_is_left_alone() -> None:
    watch = Watch(0.0)
    for now in (0.0, 0.1, 0.2):
        cases = watch.judge(now=now, alive={}, seen=[A], records={}, driven_here=[ID])
        assert cases == []
