"""The decision log as a server: the real `Register`, reached by messages and watched from outside.

Each method is one message's worth of work, so one atomic step. Answers are never None; a caller
that gets None lost the answer, or the question, and does not know which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coordinator.log.base import (
    Answer,
    Attempt,
    BelowHorizon,
    Incident,
    KeyState,
    LogIdentity,
    Mark,
    Page,
    Proposal,
    Reading,
    Record,
    Resource,
    Stands,
    Unreadable,
)
from coordinator.model import Claim, Decision, LogId, TransactionId, Verdict
from tests.simulation.faults import KEY_RETENTION

if TYPE_CHECKING:
    from tests.simulation.resources import Slot
    from tests.simulation.world import World

PAGE = 1000


class LogServer:
    """One log of the world."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.id = LogId(f"{number:016x}")
        self.down = self.full = self.lost = False
        self.poisoned: set[TransactionId] = set()
        self.register = world.parts.register(
            LogIdentity(self.id, world.epoch_ms + int(world.now * 1000) - world.log_age_ms)
        )

    def __repr__(self) -> str:
        return f"<log {self.id[-4:]}>"

    @property
    def horizon(self) -> TransactionId:
        return self.register.horizon

    def _refuses(self, what: str) -> bool:
        """The disk is full: nothing is written, and the caller is told so."""
        if self.full:
            self.world.count(f"S14 {what} waits for space in the log")
        return self.full

    def _is_poisoned(self, transaction: TransactionId) -> bool:
        if transaction in self.poisoned:
            self.world.count("S46 a record cannot be read")
            return True
        return False

    def propose(self, proposal: Proposal) -> Answer | None:
        if self._refuses("a decision") or self._is_poisoned(proposal.transaction):
            return None
        answer = self.register.propose(proposal)
        self.world.checker.proposed(proposal, answer)
        if isinstance(answer, BelowHorizon):
            self.world.count("a proposal is refused below the horizon")
        elif isinstance(answer, Stands) and not answer.ours:
            self._count_loser(proposal.decision, answer.record.decision)
        if self.world.trace is not None:
            shown: object = answer
            if isinstance(answer, Stands):  # without its set of ended branches, which has no order
                shown = f"{answer.record.decision.verdict} stands, ours: {answer.ours}"
            self.world.note(f"{self}: {proposal.decision.verdict} {proposal.transaction}: {shown}")
        return answer

    def _count_loser(self, proposed: Decision, stands: Decision) -> None:
        if proposed.verdict is Verdict.ABORT and stands.verdict is not Verdict.ABORT:
            self.world.count("S04 recovery finds a commit standing and obeys")
        elif proposed.verdict is not Verdict.ABORT and stands.verdict is Verdict.ABORT:
            self.world.count("S10 a commit comes after another's abort")

    def record_answer(self, request: tuple[TransactionId, Verdict]) -> tuple[Verdict | None] | None:
        if self._refuses("an answer") or self._is_poisoned(request[0]):
            return None
        stands = self.register.record_answer(*request)
        self.world.checker.answered(request[0], stands)
        if self.world.trace is not None:
            self.world.note(f"{self}: answer {request[1]} for {request[0]}: {stands}")
        return (stands,)

    def read(self, transaction: TransactionId) -> Reading:
        return self.register.read(transaction)

    def read_many(self, transactions: Sequence[TransactionId]) -> list[Record | Unreadable | None]:
        found = [self.register.read(transaction).record for transaction in transactions]
        return [None if record is None else self._as_read(record) for record in found]

    def _as_read(self, record: Record | Unreadable) -> Record | Unreadable:
        if record.transaction in self.poisoned:
            return Unreadable(record.transaction, "its bytes are damaged")
        return record

    def read_key(self, claim: Claim) -> KeyState:
        return self.register.read_key(claim)

    def name_attempt(self, request: tuple[Claim, Attempt, TransactionId | None]) -> KeyState | None:
        if self._refuses("a key's name"):
            return None
        return self.register.name_attempt(*request)

    def scan(self, after: TransactionId | None) -> Page:
        page = self.register.scan(after, PAGE)
        if not self.poisoned:
            return page
        return Page(tuple(self._as_read(each) for each in page.records), page.after)

    def finish(self, marks: Sequence[Mark]) -> bool | None:
        if self.full:
            return None
        self.register.finish([mark for mark in marks if mark.transaction not in self.poisoned])
        return True

    def raise_horizon(self, to: TransactionId) -> TransactionId | None:
        if self.full:
            return None
        return self.register.raise_horizon(to)

    def forget(self, now_ms: int) -> tuple[int] | None:
        if self.full:
            return None
        before = dict(self.register._records)
        gone = self.register.forget(PAGE, claims_before_ms=now_ms - int(KEY_RETENTION * 1000))
        for transaction in self.poisoned & before.keys():
            self.register._records[transaction] = before[transaction]
        if gone:
            left = self.register._records
            deleted = [record for each, record in before.items() if each not in left]
            self.world.checker.deleted(deleted, self.register.horizon)
            self.world.count("records are forgotten", gone)
            if self.world.trace is not None:
                self.world.note(f"{self}: forgets {[each.transaction for each in deleted]}")
        return (gone,)

    def swept(self, marks: Sequence[tuple[str, TransactionId, int]]) -> bool | None:
        if self.full:
            return None
        for name, clear, swept_ms in marks:
            self.register.swept(name, clear, swept_ms)
        return True

    def resources(self, _: None) -> Sequence[Resource]:
        return self.register.resources()

    def report(self, request: tuple[Incident, Slot, float]) -> bool | None:
        """Keep an incident, and tell the checker of a quarantine with the time of its refusal."""
        if self._refuses("an incident"):
            return None
        incident, slot, refused_at = request
        self.register.report(incident)
        if self.world.trace is not None:
            self.world.note(f"{self}: incident {incident.kind or 'quarantine'} of {slot}")
        if incident.kind is None:
            self.world.quarantined(slot, refused_at)
        else:
            self.world.checker.shown(slot)
            if slot.lost:
                self.world.count("S28 a lost branch of a commit is shown to a person")
            elif slot.by_person:
                self.world.count("S31 what a person ended against the decision is shown")
        return True

    def incidents(self, _: None) -> Sequence[Incident]:
        return self.register.incidents()
