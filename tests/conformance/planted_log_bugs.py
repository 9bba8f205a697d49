"""Decision logs with one mistake each, which the suite has to find.

`REGISTERS` and `LOGS` say by which check each has to be found; others may find it too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from coordinator.log.base import (
    Answer,
    Attempt,
    BelowHorizon,
    ClaimHeld,
    KeyState,
    Mark,
    Proposal,
    Stands,
    Word,
)
from coordinator.log.memory import MemoryLog
from coordinator.log.register import Held, Register
from coordinator.model import Claim, TransactionId, id_floor


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
            self._claims.setdefault(claim, Held(proposal.transaction, b""))
        return super().propose(proposal)


class ClaimsBeforeStandingRecord(Register):
    def propose(self, proposal: Proposal) -> Answer:
        free = dict(self._claims)
        answer = super().propose(proposal)
        held = [claim for claim in proposal.claims if claim in free]
        if isinstance(answer, Stands) and not answer.ours and held:
            return ClaimHeld(held[0], free[held[0]].holder)
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


class ResultsDieWithTheRecord(Register):
    def read_key(self, claim: Claim) -> KeyState:
        state = super().read_key(claim)
        if state.holder in self._records:
            return state
        return msgspec.structs.replace(state, attachment=b"")


class ResultsOfTheFirstClaimOnly(Register):
    def propose(self, proposal: Proposal) -> Answer:
        answer = super().propose(proposal)
        for claim in proposal.claims[1:]:
            if claim in self._claims:
                self._claims[claim] = self._claims[claim]._replace(attachment=b"")
        return answer


class UnresolvedHasCommitted(Register):
    def read_key(self, claim: Claim) -> KeyState:
        held = self._claims.get(claim)
        if held is None:
            return super().read_key(claim)
        return KeyState(held.holder, True, held.attachment, self._attempts.get(claim))


class NamesBlindly(Register):
    def name_attempt(
        self, claim: Claim, attempt: Attempt, expected: TransactionId | None
    ) -> KeyState:
        if claim not in self._claims:
            self._attempts[claim] = attempt
        return self.read_key(claim)


class NamesOnce(Register):
    def name_attempt(
        self, claim: Claim, attempt: Attempt, expected: TransactionId | None
    ) -> KeyState:
        return super().name_attempt(claim, attempt, None)


class NamesUnderHeldKeys(Register):
    def name_attempt(
        self, claim: Claim, attempt: Attempt, expected: TransactionId | None
    ) -> KeyState:
        held = self._claims.pop(claim, None)
        try:
            return super().name_attempt(claim, attempt, expected)
        finally:
            if held is not None:
                self._claims[claim] = held


class NamesWithoutTheSpace(Register):
    def name_attempt(
        self, claim: Claim, attempt: Attempt, expected: TransactionId | None
    ) -> KeyState:
        return super().name_attempt(Claim("", claim.key), attempt, expected)

    def read_key(self, claim: Claim) -> KeyState:
        return super().read_key(Claim("", claim.key))


class TellsItsOwnName(Register):
    def name_attempt(
        self, claim: Claim, attempt: Attempt, expected: TransactionId | None
    ) -> KeyState:
        state = super().name_attempt(claim, attempt, expected)
        return msgspec.structs.replace(state, attempt=attempt)


class NamesForAWholeSecond(Register):
    def name_attempt(
        self, claim: Claim, attempt: Attempt, expected: TransactionId | None
    ) -> KeyState:
        attempt = msgspec.structs.replace(attempt, timeout_ms=1_000)
        return super().name_attempt(claim, attempt, expected)


class ClaimsGoBeforeTheirRecords(Register):
    def forget(self, limit: int, *, claims_before_ms: int) -> int:
        before = min(self.horizon, id_floor(claims_before_ms))
        gone = super().forget(limit, claims_before_ms=claims_before_ms)
        self._claims = {c: held for c, held in self._claims.items() if held.holder >= before}
        return gone


class NamesStayForEver(Register):
    def forget(self, limit: int, *, claims_before_ms: int) -> int:
        names = dict(self._attempts)
        gone = super().forget(limit, claims_before_ms=claims_before_ms)
        self._attempts = names
        return gone


class NamesGoAtTheHorizon(Register):
    def forget(self, limit: int, *, claims_before_ms: int) -> int:
        gone = super().forget(limit, claims_before_ms=claims_before_ms)
        self._attempts = {
            claim: attempt
            for claim, attempt in self._attempts.items()
            if attempt.transaction >= self.horizon
        }
        return gone


class NamesGoAboveTheHorizon(Register):
    def forget(self, limit: int, *, claims_before_ms: int) -> int:
        gone = super().forget(limit, claims_before_ms=claims_before_ms)
        self._attempts = {
            claim: attempt
            for claim, attempt in self._attempts.items()
            if attempt.transaction >= id_floor(claims_before_ms)
        }
        return gone


class KeysGoWithoutLimit(Register):
    def forget(self, limit: int, *, claims_before_ms: int) -> int:
        gone = super().forget(limit, claims_before_ms=claims_before_ms)
        super().forget(1_000, claims_before_ms=claims_before_ms)
        return gone


class MarksOfStrangers(Register):
    def finish(self, marks: Sequence[Mark]) -> None:
        for mark in marks:
            record = self._records.get(mark.transaction)
            if record is not None:
                ended = record.ended | {mark.branch}
                self._records[mark.transaction] = msgspec.structs.replace(record, ended=ended)


class AlwaysOurs(Register):
    def propose(self, proposal: Proposal) -> Answer:
        answer = super().propose(proposal)
        return Stands(answer.record, ours=True) if isinstance(answer, Stands) else answer


class WordOverwritten(Register):
    def give_word(self, word: Word) -> Word:
        self._words[word.subject] = word
        return word


class TellsItsOwnWord(Register):
    def give_word(self, word: Word) -> Word:
        super().give_word(word)
        return word


class OneWordForAll(Register):
    def give_word(self, word: Word) -> Word:
        return next(iter(self._words.values()), None) or super().give_word(word)


class WordsInTheOrderOfTheirWriting(Register):
    def words(self) -> Sequence[Word]:
        return tuple(self._words.values())


class WordsAcknowledgeIncidents(Register):
    def give_word(self, word: Word) -> Word:
        self.acknowledge(word.subject)
        return super().give_word(word)


class WordsGoWithTheirIncident(Register):
    def acknowledge(self, gid: str) -> bool:
        self._words.pop(gid, None)
        return super().acknowledge(gid)


class WordsAreForgotten(Register):
    def forget(self, limit: int, *, claims_before_ms: int) -> int:
        kept = {k: word for k, word in self._words.items() if word.given_ms >= claims_before_ms}
        self._words = kept
        return super().forget(limit, claims_before_ms=claims_before_ms)


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

    _copy: dict[Claim, Held] | None = None

    async def read_key(self, claim: Claim) -> KeyState:
        copy, self._copy = self._copy or {}, dict(self.state._claims)
        held = copy.get(claim)
        return KeyState() if held is None else KeyState(held.holder, True, held.attachment)


class NameComparedOutsideTheWrite(MemoryLog):
    """It reads the name, lets others run, and writes."""

    async def name_attempt(
        self, claim: Claim, attempt: Attempt, expected: TransactionId | None
    ) -> KeyState:
        before = self.state.read_key(claim)
        await asyncio.sleep(0)
        named = None if before.attempt is None else before.attempt.transaction
        if before.holder is not None or named != expected:
            return before
        self.state._attempts[claim] = attempt
        return KeyState(attempt=attempt)


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
    ResultsDieWithTheRecord: "claims_outlive_their_records_and_the_horizon",
    ResultsOfTheFirstClaimOnly: "nobody_names_an_attempt_under_a_held_key",
    UnresolvedHasCommitted: "a_result_counts_once_the_last_resource_has_answered",
    NamesBlindly: "an_attempt_is_named_by_compare_and_set",
    NamesOnce: "an_attempt_is_named_by_compare_and_set",
    NamesUnderHeldKeys: "nobody_names_an_attempt_under_a_held_key",
    NamesWithoutTheSpace: "each_key_has_a_name_of_its_own",
    TellsItsOwnName: "one_of_the_callers_racing_for_a_key_names_its_attempt",
    NamesForAWholeSecond: "an_attempt_is_named_by_compare_and_set",
    ClaimsGoBeforeTheirRecords: "a_claim_stays_as_long_as_its_holders_record",
    NamesStayForEver: "names_of_attempts_have_the_retention_of_claims",
    NamesGoAtTheHorizon: "names_of_attempts_have_the_retention_of_claims",
    NamesGoAboveTheHorizon: "names_of_attempts_have_the_retention_of_claims",
    KeysGoWithoutLimit: "forgetting_keys_is_limited_and_oldest_first",
    MarksOfStrangers: "a_mark_of_what_is_not_named_is_passed_over",
    AlwaysOurs: "racing_proposals_agree",
    WordOverwritten: "a_word_is_written_once",
    TellsItsOwnWord: "one_of_the_racing_words_stands",
    OneWordForAll: "a_word_is_written_once",
    WordsInTheOrderOfTheirWriting: "a_word_is_written_once",
    WordsAcknowledgeIncidents: "words_and_incidents_leave_each_other_alone",
    WordsGoWithTheirIncident: "words_and_incidents_leave_each_other_alone",
    WordsAreForgotten: "words_and_incidents_leave_each_other_alone",
}
LOGS: dict[type[MemoryLog], str] = {
    HorizonComparedOutsideTheWrite: "the_horizon_is_compared_in_the_write",
    NameComparedOutsideTheWrite: "one_of_the_callers_racing_for_a_key_names_its_attempt",
    ReadsLate: "reads_see_every_answer_given_before",
}
