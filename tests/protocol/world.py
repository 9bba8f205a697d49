"""The world of a random walk: one register and a few resources, each step of theirs atomic.

It knows nothing of coordinators and trusts none: whatever an action makes a resource do is reported
to the naive twin, which raises `Violation` where the specification does not allow it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from coordinator.events import (
    Action,
    Answered,
    AskLastResource,
    ClaimStands,
    Commit,
    CommitOnePhase,
    Decide,
    Decided,
    Event,
    Finished,
    Forget,
    Prepare,
    RecordAnswer,
    Refused,
    Report,
    Resolved,
    Rollback,
    Voted,
)
from coordinator.model import Branch, BranchId, Claim, Decision, Verdict, Vote, VoteKind
from tests.protocol.tcommit import TCommit, Violation
from tests.protocol.values import ABORTED, OTHER_ID, PREPARED, READ_ONLY, branch

CLAIM = Claim("key", "order-7")
STRAY = branch("stray")
LAST = branch("events")


@dataclass
class Options:
    """What may happen in one walk; drawn by its seed, so that walks differ in kind."""

    branches: int
    last_resource: bool
    one_phase: bool
    published: bool
    claims: bool
    claim_held: bool
    handed: bool
    stray: bool
    noes: float
    read_only: float
    lost: float
    horizon: float

    @classmethod
    def draw(cls, dice: random.Random) -> Options:
        return cls(
            branches=dice.choice([0, 1, 1, 2, 2, 2, 3]),
            last_resource=dice.random() < 0.3,
            one_phase=dice.random() < 0.5,
            published=dice.random() < 0.4,
            claims=dice.random() < 0.3,
            claim_held=dice.random() < 0.3,
            handed=dice.random() < 0.2,
            stray=dice.random() < 0.3,
            noes=dice.choice([0.0, 0.0, 0.1, 0.4]),
            read_only=dice.choice([0.0, 0.2, 0.5, 1.0]),
            lost=dice.choice([0.0, 0.1, 0.4]),
            horizon=dice.choice([0.0, 0.0, 0.05, 0.3]),
        )


class World:
    """What outlives every coordinator."""

    def __init__(self, dice: random.Random, options: Options) -> None:
        self.dice = dice
        self.options = options
        self.register: Decision | None = None
        self.stood: Decision | None = None  # what ever stood, also after it was forgotten
        self.answer: Verdict | None = None
        self.marked: set[BranchId] = set()
        self.below_horizon = False
        self.branches = {each.id: each for each in self._local_branches()}
        self.prepared: set[BranchId] = set()
        self.ended: dict[BranchId, Verdict] = {}
        self.votes: dict[BranchId, Vote] = {}
        self.spec = TCommit({each.participant for each in self.branches.values()})

    def _local_branches(self) -> list[Branch]:
        found = [branch(name) for name in ("accounts", "ledger", "stock")[: self.options.branches]]
        return [*found, LAST] if self.options.last_resource and not self.options.handed else found

    @property
    def seen(self) -> list[Branch]:
        """What a sweep sees: prepared branches. A last resource does not show its open ones."""
        found = [*self.branches.values(), STRAY]
        return [each for each in found if each.id in self.prepared and each != LAST]

    @property
    def forgotten(self) -> bool:
        """No proposal is taken any more: what is prepared now is quarantined and shown."""
        return self.below_horizon and self.register is None

    @property
    def commit_stood(self) -> bool:
        if self.stood is None:
            return False
        return Verdict.COMMIT in (self.stood.verdict, self.answer)

    def forget(self) -> bool:
        """Delete the record below the horizon once it is finished; tells whether it did."""
        if self.register is None or not self.below_horizon:
            return False
        unanswered = self.register.verdict is Verdict.DELEGATED and self.answer is None
        commits = Verdict.COMMIT in (self.register.verdict, self.answer)
        named = {each.id for each in self.register.branches}
        if unanswered or (commits and not named <= self.marked):
            return False
        self.register = None
        return True

    def perform(self, action: Action, *, stranger: bool) -> Event | None:
        match action:
            case Prepare(target):
                return Voted(target.id, self.prepare(target))
            case Decide(decision, claims):
                return self._propose(decision, claims)
            case Commit(target):
                self._commit(target)
                return Finished(target.id)
            case Rollback(target):
                self._roll_back(target, stranger=stranger)
                return Finished(target.id)
            case CommitOnePhase(target):
                return self._commit_one_phase(target)
            case AskLastResource(target, commit):
                return self._ask_last_resource(target, commit=commit)
            case RecordAnswer(verdict):
                return self._record_answer(verdict)
            case Forget(branch_id):
                self.marked.add(branch_id)
                return None
            case Report(reported, ending):
                raise Violation(f"{reported.participant}: {ending}")

    def prepare(self, target: Branch) -> Vote:
        roll = self.dice.random()
        if target.id in self.ended or roll < self.options.noes:
            self.abort(target)
            vote = ABORTED
        elif roll < self.options.noes + self.options.read_only and target != LAST:
            self.spec.leave(target.participant)
            vote = READ_ONLY
        else:
            self.spec.prepare(target.participant)
            self.prepared.add(target.id)
            vote = PREPARED
        self.votes[target.id] = vote
        return vote

    def _propose(self, decision: Decision, claims: tuple[Claim, ...]) -> Event:
        if self.register is None and self.below_horizon:
            return Refused()
        if self.register is None and claims and self.options.claim_held:
            return ClaimStands(CLAIM, OTHER_ID)
        if self.register is None:
            self.register = self.stood = decision
        return Decided(self.register, frozenset(self.marked), self.answer)

    def _record_answer(self, verdict: Verdict) -> Event:
        if self.register is None:
            return Refused()
        self.answer = self.answer or verdict
        return Resolved(self.answer)

    def _commit(self, target: Branch) -> None:
        vote = self.votes.get(target.id)
        if vote is not None and vote.kind is VoteKind.READ_ONLY:
            if self.ended.get(target.id) is Verdict.ABORT:
                raise Violation(f"a read-only {target.participant} is committed after a rollback")
            self.ended[target.id] = Verdict.COMMIT
            return
        if self.ended.get(target.id) is Verdict.COMMIT:
            return
        self.spec.commit(target.participant)
        self.prepared.discard(target.id)
        self.ended[target.id] = Verdict.COMMIT

    def _roll_back(self, target: Branch, *, stranger: bool) -> None:
        if self.ended.get(target.id) is Verdict.COMMIT:
            raise Violation(f"rollback of {target.participant}, which has committed")
        overtakes = target.id not in self.prepared and target.id not in self.votes
        if overtakes and (stranger or self.dice.random() < 0.5):
            # It finds nothing, a stranger's always and the owner's sometimes; the prepare may still
            # land.
            return
        self.abort(target)

    def abort(self, target: Branch) -> None:
        self.spec.abort(target.participant)
        self.prepared.discard(target.id)
        self.ended[target.id] = Verdict.ABORT

    def _commit_one_phase(self, target: Branch) -> Event:
        if target.id in self.ended or self.dice.random() < 0.3:
            self.abort(target)
            return Answered(Verdict.ABORT, "serialization failure", retryable=True)
        self.spec.commit(target.participant, alone=True)
        self.ended[target.id] = Verdict.COMMIT
        return Answered(Verdict.COMMIT)

    def _ask_last_resource(self, target: Branch, *, commit: bool) -> Event:
        if target.id not in self.ended:
            if commit and self.dice.random() < 0.8:
                self.spec.commit(target.participant)
                self.ended[target.id] = Verdict.COMMIT
                self.prepared.discard(target.id)
            else:
                self.abort(target)
        return Answered(self.ended[target.id])
