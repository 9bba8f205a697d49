"""Decision logs with one mistake each, which the suite has to find.

`REGISTERS` and `LOGS` say by which check each has to be found; others may find it too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from coordinator.log.base import Answer, BelowHorizon, ClaimHeld, Mark, Proposal, Stands
from coordinator.log.memory import MemoryLog
from coordinator.log.register import Register
from coordinator.model import Claim, TransactionId


class LastWriterWins(Register):
    def propose(self, proposal: Proposal) -> Answer:
        self._records.pop(proposal.transaction, None)
        return super().propose(proposal)


class NoHorizon(Register):
    def propose(self, proposal: Proposal) -> Answer:
        answer = super().propose(proposal)
        if not isinstance(answer, BelowHorizon):
            return answer
        horizon, self.horizon = self.horizon, TransactionId("")
        try:
            return super().propose(proposal)
        finally:
            self.horizon = horizon


class HorizonBeforeStandingRecord(Register):
    def propose(self, proposal: Proposal) -> Answer:
        if proposal.transaction < self.horizon:
            return BelowHorizon(self.horizon)
        return super().propose(proposal)


class HorizonLowered(Register):
    def raise_horizon(self, to: TransactionId) -> TransactionId:
        self.horizon = to
        return to


class ForgetsUnfinished(Register):
    def forget(self, limit: int, *, claims_before_ms: int) -> int:
        gone = sorted(each for each in self._records if each < self.horizon)[:limit]
        for transaction in gone:
            del self._records[transaction]
        return len(gone)


class ForgetsAboveHorizon(Register):
    def forget(self, limit: int, *, claims_before_ms: int) -> int:
        gone = [each for each, record in self._records.items() if record.finished][:limit]
        for transaction in gone:
            del self._records[transaction]
        return len(gone)


class ClaimsIgnored(Register):
    def propose(self, proposal: Proposal) -> Answer:
        return super().propose(msgspec.structs.replace(proposal, claims=()))


class ClaimsOfAborts(Register):
    def propose(self, proposal: Proposal) -> Answer:
        for claim in proposal.claims:
            self._claims.setdefault(claim, proposal.transaction)
        return super().propose(proposal)


class ClaimsBeforeStandingRecord(Register):
    def propose(self, proposal: Proposal) -> Answer:
        free = dict(self._claims)
        answer = super().propose(proposal)
        held = [claim for claim in proposal.claims if claim in free]
        if isinstance(answer, Stands) and not answer.ours and held:
            return ClaimHeld(held[0], free[held[0]])
        return answer


class ClaimsDieWithTheRecord(Register):
    def forget(self, limit: int, *, claims_before_ms: int) -> int:
        return super().forget(limit, claims_before_ms=1 << 47)


class MarksAreWholeCommits(Register):
    def finish(self, marks: Sequence[Mark]) -> None:
        for mark in marks:
            record = self._records.get(mark.transaction)
            if record is not None:
                super().finish(
                    [Mark(mark.transaction, branch.id) for branch in record.decision.branches]
                )


class AttachmentLost(Register):
    def propose(self, proposal: Proposal) -> Answer:
        return super().propose(msgspec.structs.replace(proposal, attachment=b""))


class AlwaysOurs(Register):
    def propose(self, proposal: Proposal) -> Answer:
        answer = super().propose(proposal)
        return Stands(answer.record, ours=True) if isinstance(answer, Stands) else answer


class HorizonComparedOutsideTheWrite(MemoryLog):
    """It compares, lets others run, and writes."""

    async def propose(self, proposal: Proposal) -> Answer:
        before = self.state.horizon
        reading = await self.read(proposal.transaction)
        if reading.record is None and proposal.transaction < before:
            return BelowHorizon(before)
        await asyncio.sleep(0)
        now, self.state.horizon = self.state.horizon, before
        try:
            return self.state.propose(proposal)
        finally:
            self.state.horizon = now


class ReadsLate(MemoryLog):
    """It answers from a copy that is brought up to date at the next read."""

    _copy: dict[Claim, TransactionId] | None = None

    async def read_claim(self, claim: Claim) -> TransactionId | None:
        copy, self._copy = self._copy or {}, dict(self.state._claims)
        return copy.get(claim)


REGISTERS: dict[type[Register], str] = {
    LastWriterWins: "the_first_proposal_wins_and_the_second_obeys",
    NoHorizon: "below_the_horizon_nothing_is_recorded",
    HorizonBeforeStandingRecord: "a_standing_record_is_returned_below_the_horizon",
    HorizonLowered: "the_horizon_only_rises",
    ForgetsUnfinished: "only_what_is_finished_and_below_the_horizon_is_forgotten",
    ForgetsAboveHorizon: "only_what_is_finished_and_below_the_horizon_is_forgotten",
    ClaimsIgnored: "one_of_two_racing_for_a_claim_wins",
    ClaimsOfAborts: "an_abort_is_finished_and_keeps_no_attachment",
    ClaimsBeforeStandingRecord: "a_repeated_proposal_finds_its_own_record",
    ClaimsDieWithTheRecord: "claims_outlive_their_records_and_the_horizon",
    MarksAreWholeCommits: "marks_finish_a_commit_branch_by_branch",
    AttachmentLost: "a_commit_stands_as_it_was_proposed",
    AlwaysOurs: "racing_proposals_agree",
}
LOGS: dict[type[MemoryLog], str] = {
    HorizonComparedOutsideTheWrite: "the_horizon_is_compared_in_the_write",
    ReadsLate: "reads_see_every_answer_given_before",
}
