"""Two-phase commit as a table: `Transaction.step(event) -> actions`.

Two rules keep this file honest. Everything that changes the state of a transaction lives here; and
a pair of phase and event that is absent from `RULES` is illegal: `step` raises `ProtocolError` and
changes nothing. There is no clock, no randomness and no I/O: a deadline is an `AbortRequested` sent
by the engine, and recovery is `Transaction.in_doubt(...)` followed by the same `AbortRequested`.

The caller's loop, which the engine, the simulator and the search all follow:

    actions = transaction.step(event)
    for action in actions:      # in any order, in parallel, repeated after a lost answer
        ...                     # perform it; its answer is the next event

The write-ahead rule can be read off the types: `Decide` is an action and `Decided` an event, so no
`Commit` can leave before the log has answered. The same holds for a last resource: `AskLastResource`
leaves only after `Decided(delegated)`, its `Answered` yields only `RecordAnswer`, and other branches
are touched after `Resolved`. After Gray & Lamport, "Consensus on Transaction Commit": [TMCommit] is
`Decided(commit)`, [RMPrepare] `Voted(PREPARED)`, [RMChooseToAbort] `Voted(ABORTED)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum

import msgspec

from coordinator.errors import ProtocolError
from coordinator.model import (
    ABORT,
    FINISHED,
    Branch,
    BranchId,
    Claim,
    Decision,
    Ending,
    EndingKind,
    Outcome,
    TransactionId,
    Verdict,
    Vote,
    VoteKind,
)

# Events: what happened.


class Enlisted(msgspec.Struct, frozen=True):
    """A branch joined. `vote` is set when it voted unasked (a called service prepares by itself).

    `one_phase`: the participant can commit it without preparing and later say whether it did.
    `last_resource`: it cannot prepare; its own commit is the decision. At most one.
    """

    branch: Branch
    vote: Vote | None = None
    one_phase: bool = False
    last_resource: bool = False


class Published(msgspec.Struct, frozen=True):
    """The id is about to leave this process: from here on every commit is recorded."""


class CommitRequested(msgspec.Struct, frozen=True):
    """The work is done and enlistment is closed. `attachment` is recorded with a commit."""

    attachment: bytes = b""


class AbortRequested(msgspec.Struct, frozen=True):
    """Somebody wants an end: the user's exception, the deadline, a person, recovery."""

    reason: str = ""
    retryable: bool = False


class Voted(msgspec.Struct, frozen=True):
    """A branch answered `Prepare`. An exception of the participant is the vote ABORTED."""

    branch: BranchId
    vote: Vote


class Decided(msgspec.Struct, frozen=True):
    """The log answered: `decision` stands, whoever proposed it.

    `ended` are the named branches already known to have ended; `answer` is a last resource's
    answer that stands beside a delegated decision.
    """

    decision: Decision
    ended: frozenset[BranchId] = frozenset()
    answer: Verdict | None = None


class Refused(msgspec.Struct, frozen=True):
    """The log holds nothing under this id and takes no proposal: it is below the horizon."""


class ClaimStands(msgspec.Struct, frozen=True):
    """The log refused a commit because another transaction holds one of its claims."""

    claim: Claim
    holder: TransactionId


class Answered(msgspec.Struct, frozen=True):
    """The resource whose own commit is the decision said which: COMMIT or ABORT."""

    verdict: Verdict
    reason: str = ""
    retryable: bool = False


class Resolved(msgspec.Struct, frozen=True):
    """The last resource's answer stands in the log beside the delegated decision."""

    verdict: Verdict


class Finished(msgspec.Struct, frozen=True):
    """A branch ended. A heuristic ending is reported and never counts as acknowledged."""

    branch: BranchId
    ending: Ending = FINISHED


Event = (
    Enlisted
    | Published
    | CommitRequested
    | AbortRequested
    | Voted
    | Decided
    | Refused
    | ClaimStands
    | Answered
    | Resolved
    | Finished
)

# Actions: what to do next.


class Prepare(msgspec.Struct, frozen=True):
    branch: Branch


class Decide(msgspec.Struct, frozen=True):
    """Propose to the log, until it answers. It binds once the log holds it, and not before."""

    decision: Decision
    claims: tuple[Claim, ...] = ()
    attachment: bytes = b""


class CommitOnePhase(msgspec.Struct, frozen=True):
    """Let the branch's own commit be the decision; answer `Answered`, never a guess."""

    branch: Branch


class AskLastResource(msgspec.Struct, frozen=True):
    """Make the last resource end, and answer how it ended.

    `commit` is set only for who proposed the delegation: it asks for commit, all others for abort;
    whoever comes first decides and everybody learns the same answer.
    """

    branch: Branch
    commit: bool


class RecordAnswer(msgspec.Struct, frozen=True):
    """Write the last resource's answer beside the decision, before another branch is touched."""

    verdict: Verdict


class Commit(msgspec.Struct, frozen=True):
    branch: Branch


class Rollback(msgspec.Struct, frozen=True):
    branch: Branch


class Forget(msgspec.Struct, frozen=True):
    """The named branch has acknowledged: mark it in the log, lazily. Not on the critical path."""

    branch: BranchId


class Report(msgspec.Struct, frozen=True):
    """The branch ended against the decision, or may have: show it to a person, with evidence."""

    branch: Branch
    ending: Ending


Action = (
    Prepare
    | Decide
    | CommitOnePhase
    | AskLastResource
    | RecordAnswer
    | Commit
    | Rollback
    | Forget
    | Report
)


class Phase(StrEnum):
    ACTIVE = "active"
    PREPARING = "preparing"
    ONE_PHASE = "one phase"
    COMMIT_PROPOSED = "commit proposed"
    ABORT_PROPOSED = "abort proposed"
    DELEGATED = "delegated"
    ANSWERED = "answered"
    COMMITTING = "committing"
    ROLLING_BACK = "rolling back"
    ENDED = "ended"
    UNKNOWN = "unknown"
    IN_DOUBT = "in doubt"


class Transaction:
    """One global transaction as one coordinator sees it.

    `claims` are taken with a commit; with claims an abort is recorded too, since the next attempt
    under the same key waits for it. `handed` says that somebody else was handed the votes.
    """

    __slots__ = (
        "_attachment",
        "_claims",
        "_commit_proposed",
        "_decision",
        "_enlisted",
        "_handed",
        "_heuristic",
        "_named",
        "_own",
        "_private",
        "_unended",
        "_votes",
        "id",
        "outcome",
        "phase",
        "reason",
        "retryable",
    )

    def __init__(
        self,
        transaction: TransactionId,
        *,
        private: bool = True,
        claims: tuple[Claim, ...] = (),
        handed: bool = False,
    ) -> None:
        self.id = transaction
        self.phase = Phase.ACTIVE
        self.outcome: Outcome | None = None
        self.reason = ""
        self.retryable = False
        self._private = private and not claims and not handed
        self._claims = claims
        self._handed = handed
        self._own = True
        self._attachment = b""
        self._commit_proposed = False
        self._decision: Decision | None = None
        self._enlisted: dict[BranchId, Enlisted] = {}
        self._votes: dict[BranchId, Vote] = {}
        self._named: frozenset[BranchId] = frozenset()
        self._unended: dict[BranchId, Branch] = {}
        self._heuristic: dict[BranchId, tuple[Branch, Ending]] = {}

    @classmethod
    def in_doubt(cls, transaction: TransactionId, branches: Iterable[Branch]) -> Transaction:
        """A transaction found by recovery, with the branches that were seen prepared."""
        found = cls(transaction, private=False)
        found.phase = Phase.IN_DOUBT
        found._own = False
        found._enlisted = {branch.id: Enlisted(branch) for branch in branches}
        return found

    def step(self, event: Event) -> list[Action]:
        """Take the event, return the actions it calls for; none of them has happened yet.

        Raises `ProtocolError`, with the state unchanged, when the event is illegal here.
        """
        rule = RULES.get((self.phase, type(event)))
        if rule is None:
            raise self._refuse(event)
        return rule(self, event)

    @property
    def branches(self) -> list[Branch]:
        """The enlisted branches, each with the token of its vote if it has voted."""
        return [self._branch(branch) for branch in self._enlisted]

    @property
    def private(self) -> bool:
        """True while nobody outside this process can know the id."""
        return self._private

    @property
    def has_last_resource(self) -> bool:
        return any(enlisted.last_resource for enlisted in self._enlisted.values())

    @property
    def heuristic(self) -> tuple[tuple[Branch, Ending], ...]:
        """The branches that disagree with the decision, or may."""
        return tuple(self._heuristic.values())

    @property
    def decided(self) -> bool:
        """True once the outcome cannot change any more, here or anywhere."""
        return self.outcome in (Outcome.COMMITTED, Outcome.ABORTED)

    def __repr__(self) -> str:
        return (
            f"<Transaction {self.id} {self.phase} "
            f"{len(self._votes)}/{len(self._enlisted)} voted, {len(self._unended)} to end>"
        )

    # Rules. Each is named for the event it answers, and for the phase where that matters.

    def _enlist(self, event: Enlisted) -> list[Action]:
        if event.branch.id in self._enlisted or (event.last_resource and self.has_last_resource):
            raise self._refuse(event)
        self._enlisted[event.branch.id] = event
        if event.vote is not None:
            self._private = False
            self._votes[event.branch.id] = event.vote
        return []

    def _publish(self, event: Published) -> list[Action]:
        self._private = False
        return []

    def _commit_requested(self, event: CommitRequested) -> list[Action]:
        self._attachment = event.attachment
        voted_no = next((v for v in self._votes.values() if v.kind is VoteKind.ABORTED), None)
        if voted_no is not None:
            return self._abort(voted_no.reason, voted_no.retryable)
        unasked = [b for b in self._enlisted if b not in self._votes]
        if self._private and len(self._enlisted) == 1 and self._enlisted[unasked[0]].one_phase:
            self.phase = Phase.ONE_PHASE
            return [CommitOnePhase(self._branch(unasked[0]))]
        self.phase = Phase.PREPARING
        if unasked:
            return [Prepare(self._branch(branch)) for branch in unasked]
        return self._all_voted()

    def _voted(self, event: Voted) -> list[Action]:
        if event.branch not in self._enlisted or event.branch in self._votes:
            raise self._refuse(event)
        self._votes[event.branch] = event.vote
        if event.vote.kind is VoteKind.ABORTED:
            return self._abort(event.vote.reason, event.vote.retryable)
        if len(self._votes) < len(self._enlisted):
            return []
        return self._all_voted()

    def _all_voted(self) -> list[Action]:
        prepared = [b for b, vote in self._votes.items() if vote.kind is VoteKind.PREPARED]
        if not prepared and self._private:
            return self._commit(Decision(Verdict.COMMIT))
        last = next((b for b in prepared if self._enlisted[b].last_resource), None)
        named = tuple(self._branch(b) for b in prepared if b != last)
        self.phase = Phase.COMMIT_PROPOSED
        self._commit_proposed = True
        self._private = False
        if last is None:
            decision = Decision(Verdict.COMMIT, named)
        else:
            decision = Decision(Verdict.DELEGATED, named, self._branch(last))
        return [Decide(decision, self._claims, self._attachment)]

    def _abort_requested(self, event: AbortRequested) -> list[Action]:
        return self._abort(event.reason, event.retryable)

    def _abort(self, reason: str, retryable: bool) -> list[Action]:
        """Abort before any commit was proposed: it needs a record only if somebody waits for it."""
        self.reason, self.retryable = reason, retryable
        if self._claims or self._handed:
            self.phase = Phase.ABORT_PROPOSED
            return [Decide(ABORT)]
        return self._roll_back()

    def _abort_while_commit_is_proposed(self, event: AbortRequested) -> list[Action]:
        # The commit may stand already: only the log can say, so nothing may be rolled back yet.
        self.reason, self.retryable = event.reason, event.retryable
        return [Decide(ABORT)]

    def _abort_in_doubt(self, event: AbortRequested) -> list[Action]:
        self.phase = Phase.ABORT_PROPOSED
        self.reason = event.reason
        return [Decide(ABORT)]

    def _remember_vote(self, event: Voted) -> list[Action]:
        self._votes.setdefault(event.branch, event.vote)
        return []

    def _decided(self, event: Decided) -> list[Action]:
        delegated = event.decision.verdict is Verdict.DELEGATED
        if delegated != (event.decision.last_resource is not None):
            raise self._refuse(event)
        self._decision = event.decision
        if event.decision.verdict is Verdict.ABORT:
            return self._roll_back()
        if event.decision.verdict is Verdict.COMMIT or event.answer is Verdict.COMMIT:
            return self._commit(event.decision, event.ended)
        if event.answer is Verdict.ABORT or event.decision.last_resource is None:
            return self._roll_back()
        self.phase = Phase.DELEGATED
        return [AskLastResource(event.decision.last_resource, commit=self._commit_proposed)]

    def _decided_again(self, event: Decided) -> list[Action]:
        """The answer to a second proposal: the register is write-once, so it must be the same."""
        if self._decision is not None and event.decision != self._decision:
            raise self._refuse(event)
        return []

    def _refused(self, event: Refused) -> list[Action]:
        # Refused is not abort. Only who prepared the branches itself, never proposed commit and
        # never handed the votes on knows that nobody can have committed.
        if self._own and not self._commit_proposed and not self._handed:
            return self._roll_back()
        self.phase = Phase.UNKNOWN
        self.outcome = Outcome.UNKNOWN
        self.reason = self.reason or "the log has forgotten transactions of that age"
        return []

    def _claim_stands(self, event: ClaimStands) -> list[Action]:
        # This commit was not recorded, yet an abort proposed meanwhile or by others may be.
        self.phase = Phase.ABORT_PROPOSED
        self.reason = f"{event.claim.space} {event.claim.key!r} is held by {event.holder}"
        return [Decide(ABORT)]

    def _answered_one_phase(self, event: Answered) -> list[Action]:
        self._unended = {}
        self.phase = Phase.ENDED
        if event.verdict is Verdict.COMMIT:
            self.outcome = Outcome.COMMITTED
        else:
            self.outcome = Outcome.ABORTED
            self.reason, self.retryable = event.reason, event.retryable
        return []

    def _answered_delegated(self, event: Answered) -> list[Action]:
        self.phase = Phase.ANSWERED
        self.reason = self.reason or event.reason
        return [RecordAnswer(event.verdict)]

    def _resolved(self, event: Resolved) -> list[Action]:
        if self._decision is None or event.verdict is Verdict.DELEGATED:
            raise self._refuse(event)
        if event.verdict is Verdict.COMMIT:
            return self._commit(self._decision)
        return self._roll_back()

    def _commit(
        self, decision: Decision, ended: frozenset[BranchId] = frozenset()
    ) -> list[Action]:
        self._decision = decision
        self.outcome = Outcome.COMMITTED
        self.phase = Phase.COMMITTING
        self._named = frozenset(branch.id for branch in decision.branches)
        actions: list[Action] = []
        for branch in decision.branches:
            if branch.id not in ended:
                self._unended[branch.id] = branch
                actions.append(Commit(branch))
        last = decision.last_resource.id if decision.last_resource else None
        for branch_id in self._enlisted:
            if branch_id in self._named or branch_id == last:
                continue
            branch = self._unended[branch_id] = self._branch(branch_id)
            vote = self._votes.get(branch_id)
            # A prepared branch that the record does not name was never promised.
            read_only = vote is not None and vote.kind is VoteKind.READ_ONLY
            actions.append(Commit(branch) if read_only else Rollback(branch))
        if not actions:
            self.phase = Phase.ENDED
        return actions

    def _roll_back(self) -> list[Action]:
        self.outcome = Outcome.ABORTED
        self.phase = Phase.ROLLING_BACK
        delegated = self._decision.last_resource if self._decision else None
        known = {branch.id: branch for branch in self.branches}
        if self._decision is not None:
            known |= {branch.id: branch for branch in self._decision.branches}
        if delegated is not None:
            known.pop(delegated.id, None)  # it was asked, and its answer is this abort
        self._unended = known
        if not known:
            self.phase = Phase.ENDED
        return [Rollback(branch) for branch in known.values()]

    def _finished(self, event: Finished) -> list[Action]:
        branch = self._unended.pop(event.branch, None)
        if branch is None:
            return []  # a second answer of a repeated action
        if not self._unended:
            self.phase = Phase.ENDED
        if event.ending.kind is not EndingKind.FINISHED:
            self._heuristic[branch.id] = (branch, event.ending)
            return [Report(branch, event.ending)]
        return [Forget(branch.id)] if branch.id in self._named else []

    def _voted_too_late(self, event: Voted) -> list[Action]:
        """A PREPARE that landed after its branch was to end: end it again if it is not named."""
        self._votes.setdefault(event.branch, event.vote)
        if event.branch in self._named or event.vote.kind is VoteKind.ABORTED:
            return []
        branch = self._unended[event.branch] = self._branch(event.branch)
        if self.phase is Phase.ENDED:
            committed = self.outcome is Outcome.COMMITTED
            self.phase = Phase.COMMITTING if committed else Phase.ROLLING_BACK
        return [Rollback(branch)]

    def _nothing(self, event: Event) -> list[Action]:
        return []

    def _branch(self, branch_id: BranchId) -> Branch:
        branch = self._enlisted[branch_id].branch
        vote = self._votes.get(branch_id)
        if vote is None or not vote.token:
            return branch
        return Branch(branch.xid, branch.participant, vote.token)

    def _refuse(self, event: Event) -> ProtocolError:
        return ProtocolError(f"{event!r} is illegal for {self!r}")


_T = Transaction
RULES: dict[tuple[Phase, type], Callable[..., list[Action]]] = {
    (Phase.ACTIVE, Enlisted): _T._enlist,
    (Phase.ACTIVE, Published): _T._publish,
    (Phase.ACTIVE, CommitRequested): _T._commit_requested,
    (Phase.ACTIVE, AbortRequested): _T._abort_requested,
    (Phase.PREPARING, Published): _T._publish,
    (Phase.PREPARING, Voted): _T._voted,
    (Phase.PREPARING, AbortRequested): _T._abort_requested,
    (Phase.ONE_PHASE, Answered): _T._answered_one_phase,
    (Phase.ONE_PHASE, AbortRequested): _T._nothing,
    (Phase.COMMIT_PROPOSED, Published): _T._nothing,
    (Phase.COMMIT_PROPOSED, AbortRequested): _T._abort_while_commit_is_proposed,
    (Phase.COMMIT_PROPOSED, Decided): _T._decided,
    (Phase.COMMIT_PROPOSED, Refused): _T._refused,
    (Phase.COMMIT_PROPOSED, ClaimStands): _T._claim_stands,
    (Phase.ABORT_PROPOSED, Published): _T._nothing,
    (Phase.ABORT_PROPOSED, Voted): _T._remember_vote,
    (Phase.ABORT_PROPOSED, AbortRequested): _T._nothing,
    (Phase.ABORT_PROPOSED, Decided): _T._decided,
    (Phase.ABORT_PROPOSED, Refused): _T._refused,
    (Phase.ABORT_PROPOSED, ClaimStands): _T._nothing,
    (Phase.DELEGATED, Answered): _T._answered_delegated,
    (Phase.DELEGATED, AbortRequested): _T._nothing,
    (Phase.DELEGATED, Decided): _T._decided_again,
    (Phase.ANSWERED, Resolved): _T._resolved,
    (Phase.ANSWERED, AbortRequested): _T._nothing,
    (Phase.ANSWERED, Decided): _T._decided_again,
    (Phase.COMMITTING, Published): _T._nothing,
    (Phase.COMMITTING, Finished): _T._finished,
    (Phase.COMMITTING, Voted): _T._voted_too_late,
    (Phase.COMMITTING, AbortRequested): _T._nothing,
    (Phase.COMMITTING, Decided): _T._decided_again,
    (Phase.COMMITTING, Refused): _T._nothing,
    (Phase.COMMITTING, ClaimStands): _T._nothing,
    (Phase.ROLLING_BACK, Published): _T._nothing,
    (Phase.ROLLING_BACK, Finished): _T._finished,
    (Phase.ROLLING_BACK, Voted): _T._voted_too_late,
    (Phase.ROLLING_BACK, AbortRequested): _T._nothing,
    (Phase.ROLLING_BACK, Decided): _T._decided_again,
    (Phase.ROLLING_BACK, Refused): _T._nothing,
    (Phase.ROLLING_BACK, ClaimStands): _T._nothing,
    (Phase.ENDED, Published): _T._nothing,
    (Phase.ENDED, Finished): _T._nothing,
    (Phase.ENDED, Voted): _T._voted_too_late,
    (Phase.ENDED, AbortRequested): _T._nothing,
    (Phase.ENDED, Decided): _T._decided_again,
    (Phase.ENDED, Refused): _T._nothing,
    (Phase.ENDED, ClaimStands): _T._nothing,
    (Phase.UNKNOWN, Published): _T._nothing,
    (Phase.UNKNOWN, AbortRequested): _T._nothing,
    (Phase.UNKNOWN, Voted): _T._remember_vote,
    (Phase.UNKNOWN, Decided): _T._decided,
    (Phase.UNKNOWN, Refused): _T._nothing,
    (Phase.IN_DOUBT, AbortRequested): _T._abort_in_doubt,
}
"""Every legal pair. The diagram in docs/design.md is drawn from this table."""
