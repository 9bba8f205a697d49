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
`Commit` can leave before the log has answered. So it is with a last resource: `AskLastResource`
leaves only after `Decided(delegated)`, its `Answered` yields only `RecordAnswer`, and the other
branches are touched after `Resolved`.

In the words of Gray & Lamport, "Consensus on Transaction Commit": [TMCommit] is `Decided(commit)`,
[RMPrepare] `Voted(PREPARED)`, [RMChooseToAbort] `Voted(ABORTED)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum

from coordinator.errors import ProtocolError
from coordinator.events import (
    AbortRequested,
    Action,
    Answered,
    AskLastResource,
    ClaimStands,
    Commit,
    CommitOnePhase,
    CommitRequested,
    Decide,
    Decided,
    Enlisted,
    Event,
    Finished,
    Forget,
    Prepare,
    Published,
    RecordAnswer,
    Refused,
    Report,
    Resolved,
    Rollback,
    Voted,
)
from coordinator.model import (
    ABORT,
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
    under the same key waits for that record. `handed` says that somebody else was handed the votes,
    or, in recovery, that somebody else had them first.
    """

    __slots__ = (
        "_abort_proposed",
        "_attachment",
        "_claims",
        "_commit_proposed",
        "_decision",
        "_enlisted",
        "_handed",
        "_heuristic",
        "_named",
        "_out",
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
        self._attachment = b""
        self._commit_proposed = False
        self._abort_proposed = False
        self._decision: Decision | None = None
        self._enlisted: dict[BranchId, Enlisted] = {}
        self._votes: dict[BranchId, Vote] = {}
        self._named: frozenset[BranchId] = frozenset()
        self._unended: dict[BranchId, Branch] = {}
        self._out: dict[BranchId, int] = {}
        self._heuristic: dict[BranchId, tuple[Branch, Ending]] = {}

    @classmethod
    def in_doubt(cls, transaction: TransactionId, branches: Iterable[Branch]) -> Transaction:
        """A transaction found by recovery, with the branches that were seen prepared."""
        found = cls(transaction, private=False, handed=True)
        for branch in branches:
            found._enlist(Enlisted(branch))
        found.phase = Phase.IN_DOUBT
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

    # Rules while the work goes on and the votes come in.

    def _enlist(self, event: Enlisted) -> list[Action]:
        remote = event.vote is not None
        if (
            event.branch.xid.transaction != self.id
            or event.branch.id in self._enlisted
            or (event.last_resource and (event.one_phase or self.has_last_resource))
            or (remote and (event.one_phase or event.last_resource))
        ):
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
        if event.attachment:
            self._private = False
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
        if not self._take_vote(event):
            return []
        if event.vote.kind is VoteKind.ABORTED:
            return self._abort(event.vote.reason, event.vote.retryable)
        if len(self._votes) < len(self._enlisted):
            return []
        return self._all_voted()

    def _take_vote(self, event: Voted) -> bool:
        """Keep a branch's first vote; False for the same one again, refused for another one."""
        known = self._votes.get(event.branch)
        if event.branch not in self._enlisted or known not in (None, event.vote):
            raise self._refuse(event)
        self._votes[event.branch] = event.vote
        return known is None

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

    # Rules for an abort.

    def _abort_requested(self, event: AbortRequested) -> list[Action]:
        return self._abort(event.reason, event.retryable)

    def _abort(self, reason: str, retryable: bool) -> list[Action]:
        """Abort before any commit was proposed: nobody can commit unless the votes were handed on.

        So it needs no record for its own sake. With claims it gets one all the same, beside the
        rollbacks, because the next attempt under the key waits for it.
        """
        self._give_reason(reason, retryable)
        if self._handed:
            return self._propose_abort()
        record: list[Action] = [Decide(ABORT)] if self._claims else []
        return record + self._roll_back()

    def _abort_while_commit_is_proposed(self, event: AbortRequested) -> list[Action]:
        # The commit may stand already: only the log can say, so nothing may be rolled back yet.
        self._give_reason(event.reason, event.retryable)
        if self._abort_proposed:
            return []
        self._abort_proposed = True
        return [Decide(ABORT)]

    def _abort_in_doubt(self, event: AbortRequested) -> list[Action]:
        self._give_reason(event.reason, event.retryable)
        return self._propose_abort()

    def _propose_abort(self) -> list[Action]:
        self.phase = Phase.ABORT_PROPOSED
        self._abort_proposed = True
        return [Decide(ABORT)]

    def _remember_vote(self, event: Voted) -> list[Action]:
        self._take_vote(event)
        return []

    # Rules for the log's answers.

    def _decided(self, event: Decided) -> list[Action]:
        delegated = event.decision.verdict is Verdict.DELEGATED
        if (
            delegated != (event.decision.last_resource is not None)
            or event.answer is Verdict.DELEGATED
        ):
            raise self._refuse(event)
        if event.decision.verdict is Verdict.ABORT:
            self._decision = event.decision
            self._give_reason("somebody else, or recovery, recorded an abort first", True)
            return self._roll_back()
        if event.decision.verdict is Verdict.COMMIT or event.answer is Verdict.COMMIT:
            return self._commit(event.decision, event.ended)
        self._decision = event.decision
        if event.answer is Verdict.ABORT or event.decision.last_resource is None:
            return self._roll_back()
        self.phase = Phase.DELEGATED
        return [AskLastResource(event.decision.last_resource, commit=self._commit_proposed)]

    def _decided_again(self, event: Decided) -> list[Action]:
        """The answer to a second proposal: the register is write-once, so it must agree."""
        known = self._decision
        verdict = event.answer or (event.decision.verdict if known is None else None)
        ended_as = {Outcome.COMMITTED: Verdict.COMMIT, Outcome.ABORTED: Verdict.ABORT}
        expected = ended_as.get(self.outcome) if self.outcome is not None else None
        contradicts = verdict is not None and expected is not None and verdict is not expected
        if contradicts or known not in (None, event.decision):
            raise self._refuse(event)
        return []

    def _decided_while_delegated(self, event: Decided) -> list[Action]:
        self._decided_again(event)
        return [] if event.answer is None else self._decided(event)

    def _refused(self, event: Refused) -> list[Action]:
        # Refused is not abort. Only who prepared the branches itself, never proposed commit and
        # never handed the votes on knows that nobody can have committed, and `_abort` has rolled
        # back without waiting for the log. Whoever waits for it here does not know.
        self.phase = Phase.UNKNOWN
        self.outcome = Outcome.UNKNOWN
        self._give_reason("the log has forgotten transactions of that age", False)
        if self._handed:
            return []
        # Whatever may be prepared is left alone; a session that only read ends for its own sake.
        readers = [
            branch
            for branch, vote in self._votes.items()
            if vote.kind is VoteKind.READ_ONLY and branch in self._enlisted
        ]
        self._out |= dict.fromkeys(readers, 0)  # their answers may come at any time from here on
        return [Rollback(self._enlisted.pop(branch).branch) for branch in readers]

    def _claim_stands(self, event: ClaimStands) -> list[Action]:
        """Our commit was not recorded; whether an abort is, the log will say."""
        if event.claim not in self._claims or event.holder == self.id:
            raise self._refuse(event)
        self._give_reason(
            f"{event.claim.space} {event.claim.key!r} is held by {event.holder}", False
        )
        return self._propose_abort()

    # Rules for a resource whose own commit is the decision.

    def _answered_one_phase(self, event: Answered) -> list[Action]:
        self._refuse_delegated(event)
        self.phase = Phase.ENDED
        if event.verdict is Verdict.COMMIT:
            self.outcome = Outcome.COMMITTED
        else:
            self.outcome = Outcome.ABORTED
            self._give_reason(event.reason, event.retryable)
        return []

    def _answered_delegated(self, event: Answered) -> list[Action]:
        self._refuse_delegated(event)
        self.phase = Phase.ANSWERED
        if event.verdict is Verdict.ABORT:
            self._give_reason(event.reason, event.retryable)
        return [RecordAnswer(event.verdict)]

    def _resolved(self, event: Resolved) -> list[Action]:
        self._refuse_delegated(event)
        if self._decision is None:
            raise self._refuse(event)
        if event.verdict is Verdict.COMMIT:
            return self._commit(self._decision)
        return self._roll_back()

    def _answered_again(self, event: Answered | Resolved) -> list[Action]:
        self._refuse_delegated(event)
        if (event.verdict is Verdict.COMMIT) != (self.outcome is Outcome.COMMITTED):
            raise self._refuse(event)
        return []

    def _refuse_delegated(self, event: Answered | Resolved) -> None:
        if event.verdict is Verdict.DELEGATED:
            raise self._refuse(event)

    # Rules for the second phase.

    def _commit(self, decision: Decision, ended: frozenset[BranchId] = frozenset()) -> list[Action]:
        self._decision = decision
        self.outcome = Outcome.COMMITTED
        self.phase = Phase.COMMITTING
        self.reason, self.retryable = "", False
        self._named = frozenset(branch.id for branch in decision.branches)
        actions: list[Action] = []
        for branch in decision.branches:
            # A branch that was marked as ended and yet seen prepared has come back: end it again.
            if branch.id not in ended or branch.id in self._enlisted:
                actions.append(self._send(Commit(branch)))
        last = decision.last_resource.id if decision.last_resource else None
        for branch_id in self._enlisted:
            if branch_id in self._named or branch_id == last:
                continue
            vote = self._votes.get(branch_id)
            # A prepared branch that the record does not name was never promised.
            read_only = vote is not None and vote.kind is VoteKind.READ_ONLY
            branch = self._branch(branch_id)
            actions.append(self._send(Commit(branch) if read_only else Rollback(branch)))
        if not actions:
            self.phase = Phase.ENDED
        return actions

    def _roll_back(self) -> list[Action]:
        self.outcome = Outcome.ABORTED
        self.phase = Phase.ROLLING_BACK
        known = {branch.id: branch for branch in self.branches}
        if self._decision is not None:
            known |= {branch.id: branch for branch in self._decision.branches}
            if self._decision.last_resource is not None:
                known.pop(self._decision.last_resource.id, None)  # its answer is this abort
        if not known:
            self.phase = Phase.ENDED
        return [self._send(Rollback(branch)) for branch in known.values()]

    def _send(self, action: Commit | Rollback) -> Action:
        branch = action.branch
        self._unended[branch.id] = branch
        self._out[branch.id] = self._out.get(branch.id, 0) + 1
        return action

    def _finished(self, event: Finished) -> list[Action]:
        if event.branch not in self._out:
            raise self._refuse(event)
        branch = self._unended.get(event.branch)
        if branch is None:
            return []  # a second answer to a repeated action
        self._out[event.branch] -= 1
        if self._out[event.branch] == 0:
            del self._unended[event.branch]
        if not self._unended:
            self.phase = Phase.ENDED
        if event.ending.kind is not EndingKind.FINISHED:
            self._heuristic[branch.id] = (branch, event.ending)
            return [Report(branch, event.ending)]
        return [Forget(branch.id)] if branch.id in self._named else []

    def _voted_too_late(self, event: Voted) -> list[Action]:
        """A PREPARE that landed after its branch was to end: end it again if it is not named."""
        last = self._decision.last_resource if self._decision else None
        ended_by_decision = event.branch in self._named or (last and event.branch == last.id)
        if not self._take_vote(event) or ended_by_decision:
            return []
        if event.vote.kind is VoteKind.ABORTED:
            return []
        if self.phase is Phase.ENDED:
            committed = self.outcome is Outcome.COMMITTED
            self.phase = Phase.COMMITTING if committed else Phase.ROLLING_BACK
        return [self._send(Rollback(self._branch(event.branch)))]

    def _nothing(self, event: Event) -> list[Action]:
        return []

    def _branch(self, branch_id: BranchId) -> Branch:
        branch = self._enlisted[branch_id].branch
        vote = self._votes.get(branch_id)
        if vote is None or not vote.token:
            return branch
        return Branch(branch.xid, branch.participant, vote.token)

    def _give_reason(self, reason: str, retryable: bool) -> None:
        """The first reason stands: it is the cause, the others follow from it."""
        if not self.reason:
            self.reason, self.retryable = reason, retryable

    def _refuse(self, event: Event) -> ProtocolError:
        return ProtocolError(f"{event!r} is illegal for {self!r}")


_T = Transaction
_ENDING = (Phase.COMMITTING, Phase.ROLLING_BACK, Phase.ENDED)

RULES: dict[tuple[Phase, type], Callable[..., list[Action]]] = {
    (Phase.ACTIVE, Enlisted): _T._enlist,
    (Phase.ACTIVE, Published): _T._publish,
    (Phase.ACTIVE, CommitRequested): _T._commit_requested,
    (Phase.ACTIVE, AbortRequested): _T._abort_requested,
    (Phase.PREPARING, Published): _T._publish,
    (Phase.PREPARING, Voted): _T._voted,
    (Phase.PREPARING, AbortRequested): _T._abort_requested,
    # Published is absent: an id that is committed in one phase must not leave the process.
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
    (Phase.DELEGATED, Published): _T._nothing,
    (Phase.DELEGATED, Voted): _T._remember_vote,
    (Phase.DELEGATED, AbortRequested): _T._nothing,
    (Phase.DELEGATED, Decided): _T._decided_while_delegated,
    (Phase.DELEGATED, Refused): _T._nothing,
    (Phase.DELEGATED, ClaimStands): _T._nothing,
    (Phase.DELEGATED, Answered): _T._answered_delegated,
    # A reader that was ended while the outcome was unknown may answer only now.
    (Phase.DELEGATED, Finished): _T._nothing,
    (Phase.ANSWERED, Published): _T._nothing,
    (Phase.ANSWERED, Voted): _T._remember_vote,
    (Phase.ANSWERED, AbortRequested): _T._nothing,
    (Phase.ANSWERED, Decided): _T._decided_while_delegated,
    # The record may be gone before the answer came to stand beside it; then others resolved it.
    (Phase.ANSWERED, Refused): _T._refused,
    (Phase.ANSWERED, ClaimStands): _T._nothing,
    (Phase.ANSWERED, Answered): _T._nothing,
    (Phase.ANSWERED, Finished): _T._nothing,
    (Phase.ANSWERED, Resolved): _T._resolved,
    (Phase.UNKNOWN, Published): _T._nothing,
    (Phase.UNKNOWN, AbortRequested): _T._nothing,
    (Phase.UNKNOWN, Voted): _T._remember_vote,
    (Phase.UNKNOWN, Decided): _T._decided,
    (Phase.UNKNOWN, Refused): _T._nothing,
    (Phase.UNKNOWN, ClaimStands): _T._nothing,
    (Phase.UNKNOWN, Answered): _T._nothing,
    (Phase.UNKNOWN, Resolved): _T._resolved,
    (Phase.UNKNOWN, Finished): _T._nothing,
    (Phase.IN_DOUBT, AbortRequested): _T._abort_in_doubt,
}
"""Every legal pair. The diagram in docs/protocol.md is drawn from this table."""

for _phase in _ENDING:
    RULES |= {
        (_phase, Published): _T._nothing,
        (_phase, AbortRequested): _T._nothing,
        (_phase, Voted): _T._voted_too_late,
        (_phase, Decided): _T._decided_again,
        (_phase, Refused): _T._nothing,
        (_phase, ClaimStands): _T._nothing,
        (_phase, Answered): _T._answered_again,
        (_phase, Resolved): _T._answered_again,
        (_phase, Finished): _T._finished,
    }
