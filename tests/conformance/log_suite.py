"""What every decision log promises, as checks that any implementation can be run against.

`CHECKS` maps a name to an async function of a `Place`: somewhere a log is kept, which can be opened
as often as a check likes, as several coordinators would. A check fails with an AssertionError.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable

import pytest

from coordinator.errors import ProtocolError
from coordinator.log.base import (
    BelowHorizon,
    KeyState,
    Log,
    LogIdentity,
    Mark,
    Proposal,
    Record,
    Stands,
)
from coordinator.model import (
    ABORT,
    Branch,
    BranchId,
    Claim,
    Decision,
    MemberId,
    TransactionId,
    Verdict,
    Xid,
    id_floor,
)

MEMBER = MemberId("00000000000000aa")
KEY = Claim("key", "order 17")
OTHER_KEY = Claim("key", "order 18")


class Place:
    """Where one log is kept. `make` returns a new handle on it, not yet open."""

    def __init__(self, make: Callable[[], Log]) -> None:
        self._make = make
        self._opened: list[Log] = []
        self.identity: LogIdentity | None = None
        self._drawn = 0

    async def open(self) -> Log:
        log = self._make()
        self.identity = await log.open()
        self._opened.append(log)
        return log

    async def close(self) -> None:
        """Close every handle, as if all processes ended."""
        for log in self._opened:
            await log.close()
        self._opened.clear()

    def draw(self) -> TransactionId:
        """An id later than all before, and later than the log's creation."""
        assert self.identity is not None
        self._drawn += 1
        floor = id_floor(self.identity.created_ms + self._drawn)
        return TransactionId(floor[:-12] + secrets.token_hex(6))

    def commit(
        self, transaction: TransactionId, *participants: str, verdict: Verdict = Verdict.COMMIT
    ) -> Decision:
        """A commit of one branch for each participant."""
        named = tuple(self.branch(transaction, name) for name in participants)
        return Decision(verdict, named)

    def branch(self, transaction: TransactionId, participant: str) -> Branch:
        assert self.identity is not None
        xid = Xid(self.identity.id, MEMBER, transaction, BranchId(secrets.token_hex(8)))
        return Branch(xid, participant, b"token of " + participant.encode())

    def delegated(self, transaction: TransactionId, *participants: str) -> Decision:
        """A delegation to a last resource, with the branches that follow its answer."""
        decision = self.commit(transaction, *participants, verdict=Verdict.DELEGATED)
        return Decision(decision.verdict, decision.branches, self.branch(transaction, "kafka"))


Check = Callable[[Place], Awaitable[None]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def stands(answer: object) -> Stands:
    assert isinstance(answer, Stands), answer
    return answer


async def finish_all(log: Log, decision: Decision) -> None:
    await log.finish([Mark(each.xid.transaction, each.id) for each in decision.branches])


@check
async def a_commit_stands_as_it_was_proposed(place: Place) -> None:
    log = await place.open()
    transaction = place.draw()
    decision = place.commit(transaction, "orders", "stock")
    answer = stands(await log.propose(Proposal(transaction, decision, attachment=b"result")))
    assert answer.ours
    assert answer.record == Record(transaction, decision, b"result")
    assert (await log.read(transaction)).record == answer.record


@check
async def an_abort_is_finished_and_keeps_no_attachment(place: Place) -> None:
    log = await place.open()
    transaction = place.draw()
    proposal = Proposal(transaction, ABORT, (KEY,), b"result")
    record = stands(await log.propose(proposal)).record
    assert record == Record(transaction, ABORT)
    assert record.finished
    assert (await log.read(transaction)).record == record
    assert await log.read_key(KEY) == KeyState()


@check
async def a_repeated_proposal_finds_its_own_record(place: Place) -> None:
    log = await place.open()
    transaction = place.draw()
    proposal = Proposal(
        transaction, place.commit(transaction, "orders"), (KEY, OTHER_KEY), b"result"
    )
    first = stands(await log.propose(proposal))
    again = stands(await log.propose(proposal))
    assert again.record == first.record
    assert (first.ours, again.ours) == (True, False)


@check
async def racing_proposals_agree(place: Place) -> None:
    logs = [await place.open() for _ in range(3)]
    for _ in range(20):
        transaction = place.draw()
        proposals = [
            Proposal(transaction, ABORT if n % 2 else place.commit(transaction, f"p{n}"))
            for n in range(6)
        ]
        answers = await asyncio.gather(
            *(logs[n % 3].propose(proposal) for n, proposal in enumerate(proposals))
        )
        records = [stands(answer).record for answer in answers]
        assert all(record == records[0] for record in records)
        winners = [n for n, answer in enumerate(answers) if stands(answer).ours]
        assert len(winners) == 1
        assert records[0].decision == proposals[winners[0]].decision


@check
async def the_first_proposal_wins_and_the_second_obeys(place: Place) -> None:
    one, other = await place.open(), await place.open()
    for first_aborts in (True, False):
        transaction = place.draw()
        commit = place.commit(transaction, "orders")
        first, second = (ABORT, commit) if first_aborts else (commit, ABORT)
        await one.propose(Proposal(transaction, first))
        answer = stands(await other.propose(Proposal(transaction, second)))
        assert answer.record.decision == first
        assert not answer.ours
        assert (await one.read(transaction)).record == answer.record


@check
async def duplicates_proposed_together_are_taken_in_order(place: Place) -> None:
    log = await place.open()
    transaction = place.draw()
    commit = place.commit(transaction, "orders")
    decisions = [commit, ABORT, commit, ABORT]
    answers = await asyncio.gather(
        *(log.propose(Proposal(transaction, decision)) for decision in decisions)
    )
    assert [stands(answer).ours for answer in answers] == [True, False, False, False]
    assert {stands(answer).record.decision.verdict for answer in answers} == {Verdict.COMMIT}


@check
async def below_the_horizon_nothing_is_recorded(place: Place) -> None:
    log = await place.open()
    early, late = place.draw(), place.draw()
    horizon = await log.raise_horizon(late)
    assert horizon == late
    assert await log.propose(Proposal(early, place.commit(early, "orders"))) == BelowHorizon(late)
    assert await log.propose(Proposal(early, ABORT)) == BelowHorizon(late)
    reading = await log.read(early)
    assert (reading.record, reading.horizon) == (None, late)
    assert stands(await log.propose(Proposal(late, ABORT))).ours


@check
async def an_id_older_than_the_log_is_refused(place: Place) -> None:
    log = await place.open()
    assert place.identity is not None
    old = id_floor(place.identity.created_ms - 1)
    answer = await log.propose(Proposal(old, ABORT))
    assert answer == BelowHorizon(id_floor(place.identity.created_ms))


@check
async def a_standing_record_is_returned_below_the_horizon(place: Place) -> None:
    log = await place.open()
    transaction = place.draw()
    proposal = Proposal(transaction, place.commit(transaction, "orders"), (KEY,))
    first = stands(await log.propose(proposal))
    await log.raise_horizon(place.draw())
    for decision in (proposal.decision, ABORT):
        again = stands(await log.propose(Proposal(transaction, decision, (KEY,))))
        assert again == Stands(first.record, ours=False)


@check
async def the_horizon_is_compared_in_the_write(place: Place) -> None:
    """Once somebody saw nothing under an id below the horizon, nothing is recorded there."""
    one, other = await place.open(), await place.open()
    for handed_over in (True, False) * 10:
        transaction, later = place.draw(), place.draw()
        proposing = asyncio.ensure_future(one.propose(Proposal(transaction, ABORT)))
        if handed_over:
            await asyncio.sleep(0)
        await other.raise_horizon(later)
        seen = (await other.read(transaction)).record
        answer = await proposing
        stands_now = (await other.read(transaction)).record
        assert isinstance(answer, BelowHorizon) == (stands_now is None)
        assert stands_now == seen


@check
async def the_horizon_only_rises(place: Place) -> None:
    one, other = await place.open(), await place.open()
    early, late = place.draw(), place.draw()
    assert await one.raise_horizon(late) == late
    assert await other.raise_horizon(early) == late
    assert (await one.read(early)).horizon == late
    assert isinstance(await one.propose(Proposal(early, ABORT)), BelowHorizon)


@check
async def the_first_answer_of_a_last_resource_stands(place: Place) -> None:
    one, other = await place.open(), await place.open()
    transaction = place.draw()
    decision = place.delegated(transaction, "orders")
    record = stands(await one.propose(Proposal(transaction, decision, (KEY,), b"result"))).record
    assert record == Record(transaction, decision, b"result")
    await finish_all(one, decision)
    unresolved = (await one.read(transaction)).record
    assert unresolved is not None and not unresolved.finished
    assert await one.read_key(KEY) == KeyState(transaction)
    assert await one.record_answer(transaction, Verdict.COMMIT) is Verdict.COMMIT
    assert await other.record_answer(transaction, Verdict.ABORT) is Verdict.COMMIT
    resolved = (await other.read(transaction)).record
    assert resolved is not None and resolved.finished
    assert resolved.answer is Verdict.COMMIT
    assert await one.read_key(KEY) == KeyState(transaction, True, b"result")


@check
async def only_a_delegated_decision_takes_an_answer(place: Place) -> None:
    log = await place.open()
    absent, aborted, committed, delegated = (place.draw() for _ in range(4))
    await log.propose(Proposal(aborted, ABORT))
    await log.propose(Proposal(committed, place.commit(committed, "orders")))
    await log.propose(Proposal(delegated, place.delegated(delegated)))
    assert await log.record_answer(absent, Verdict.COMMIT) is None
    for transaction, answer in (
        (aborted, Verdict.COMMIT),
        (committed, Verdict.COMMIT),
        (delegated, Verdict.DELEGATED),
    ):
        with pytest.raises(ProtocolError):
            await log.record_answer(transaction, answer)
    record = (await log.read(delegated)).record
    assert record is not None and record.answer is None


@check
async def reads_see_every_answer_given_before(place: Place) -> None:
    one, other = await place.open(), await place.open()
    for _ in range(20):
        transaction = place.draw()
        assert (await other.read(transaction)).record is None
        claim = Claim("key", transaction)
        decision = place.commit(transaction, "orders")
        await one.propose(Proposal(transaction, decision, (claim,)))
        reading, state = await asyncio.gather(other.read(transaction), other.read_key(claim))
        assert reading.record == Record(transaction, decision)
        assert state == KeyState(transaction, True)
