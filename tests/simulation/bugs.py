"""Planted bugs: each breaks one rule of docs/design.md, and the simulation must find it.

A bug replaces parts of a world by subclasses of the real ones. `BUGS` is the list; the table of
which invariant found which bug how soon is printed by `python -m tests.simulation --bug-table`.
"""

from __future__ import annotations

from typing import Any

from coordinator.events import (
    AskLastResource,
    Commit,
    Decide,
    Decided,
    Finished,
    Forget,
    RecordAnswer,
    Voted,
)
from coordinator.log.base import BelowHorizon, Proposal, Record, Stands
from coordinator.log.register import Register
from coordinator.model import (
    ABORT,
    FINISHED,
    Decision,
    Outcome,
    Status,
    Verdict,
    VoteKind,
    id_time_ms,
)
from coordinator.protocol import Phase, Transaction
from tests.simulation import bugs_around as around
from tests.simulation.bugs_of_servers import OF_SERVERS
from tests.simulation.planting import Bug, mutant
from tests.simulation.world import REAL, Parts


def _nothing(self: Any, event: Any) -> list[Any]:
    return []


_EARLY_ENDS = {
    (phase, Finished): _nothing
    for phase in Phase
    if phase not in (Phase.COMMITTING, Phase.ROLLING_BACK)
}

# The core.


def _commit_at_once(self: Any) -> list[Any]:
    actions = Transaction._all_voted(self)
    named = [
        branch for each in actions if isinstance(each, Decide) for branch in each.decision.branches
    ]
    return [*actions, *(Commit(branch) for branch in named)]


def _roll_back_at_deadline(self: Any, event: Any) -> list[Any]:
    return self._roll_back()


def _roll_back_when_refused(self: Any, event: Any) -> list[Any]:
    return self._roll_back()


def _abort_unrecorded(self: Any, reason: str, retryable: bool) -> list[Any]:
    self._give_reason(reason, retryable)
    return self._roll_back()


def _always_one_phase(self: Any, event: Any) -> list[Any]:
    self._private = self._private or not self._votes
    return Transaction._commit_requested(self, event)


def _claimed_is_private(
    self: Any, transaction: Any, *, private: bool = True, claims: Any = (), handed: bool = False
) -> None:
    Transaction.__init__(self, transaction, private=private, claims=claims, handed=handed)
    self._private = private and not handed


def _ask_beside_the_register(self: Any) -> list[Any]:
    actions = Transaction._all_voted(self)
    decide = actions[0]
    if not isinstance(decide, Decide) or decide.decision.last_resource is None:
        return actions
    return [AskLastResource(decide.decision.last_resource, True), decide]


def _touch_before_the_answer_stands(self: Any, event: Any) -> list[Any]:
    record = RecordAnswer(event.verdict)
    if event.verdict is Verdict.COMMIT:
        return [*self._commit(self._decision), record]
    return [*self._roll_back(), record]


def _commit_all_prepared(
    self: Any, decision: Decision, ended: frozenset[Any] = frozenset()
) -> list[Any]:
    last = decision.last_resource
    extra = tuple(
        branch
        for branch in self.branches
        if (self._votes.get(branch.id) is None or self._votes[branch.id].kind is VoteKind.PREPARED)
        and branch.id not in {each.id for each in decision.branches}
        and (last is None or branch.id != last.id)
    )
    wider = Decision(decision.verdict, decision.branches + extra, last)
    actions = Transaction._commit(self, wider, ended)
    self._decision = decision
    return actions


def _believe_the_first_vote(self: Any, event: Any) -> list[Any]:
    if not self._take_vote(event):
        return []
    if event.vote.kind is VoteKind.ABORTED:
        return self._abort(event.vote.reason, event.vote.retryable)
    return self._all_voted()


def _count_no_as_read_only(self: Any, event: Any) -> list[Any]:
    self._take_vote(event)
    return self._all_voted() if len(self._votes) == len(self._enlisted) else []


def _end_readers_with_their_vote(self: Any, event: Any) -> list[Any]:
    actions = Transaction._voted(self, event)
    if event.vote.kind is VoteKind.READ_ONLY and self.phase is Phase.PREPARING:
        return [*actions, Commit(self._branch(event.branch))]
    return actions


def _tolerant_finished(self: Any, event: Any) -> list[Any]:
    return Transaction._finished(self, event) if event.branch in self._out else []


def _swallow_heuristics(self: Any, event: Any) -> list[Any]:
    return Transaction._finished(self, Finished(event.branch, FINISHED))


def _forget_tokens(self: Any, branch_id: Any) -> Any:
    return self._enlisted[branch_id].branch


def _mark_at_once(self: Any, decision: Decision, ended: frozenset[Any] = frozenset()) -> list[Any]:
    actions = Transaction._commit(self, decision, ended)
    return [*actions, *(Forget(branch.id) for branch in decision.branches)]


# The log.


class _LastWriterWins(Register):
    def propose(self, proposal: Proposal) -> Any:
        self._records.pop(proposal.transaction, None)
        return super().propose(proposal)


class _HorizonUnchecked(Register):
    def propose(self, proposal: Proposal) -> Any:
        answer = super().propose(proposal)
        if isinstance(answer, BelowHorizon):
            record = Record(proposal.transaction, proposal.decision)
            self._records[proposal.transaction] = record
            return Stands(record, ours=True)
        return answer


class _HorizonFalls(Register):
    def raise_horizon(self, to: Any) -> Any:
        self.horizon = to
        return to


class _ForgetsUnfinished(Register):
    def forget(self, limit: int, *, claims_before_ms: int) -> int:
        gone = [each for each in self._records if each < self.horizon][:limit]
        for each in gone:
            del self._records[each]
        return len(gone)


class _ForgetsAboveHorizon(Register):
    def forget(self, limit: int, *, claims_before_ms: int) -> int:
        gone = [each for each, record in self._records.items() if record.finished][:limit]
        for each in gone:
            del self._records[each]
        return len(gone)


class _KeysGoWithRecords(Register):
    def forget(self, limit: int, *, claims_before_ms: int) -> int:
        return super().forget(limit, claims_before_ms=id_time_ms(self.horizon))


class _ClaimsUnchecked(Register):
    def propose(self, proposal: Proposal) -> Any:
        return super().propose(Proposal(proposal.transaction, proposal.decision))


# Statuses.


def _absent_is_aborted(world: Any, truth: Any, reading: Any) -> Status:
    status = REAL.status(world, truth, reading)
    return Status.ABORTED if status is Status.UNDECIDED else status


def _from_a_follower(world: Any, truth: Any, reading: Any) -> Status:
    status: Status = REAL.status(world, truth, reading)
    return Status.UNDECIDED if world.random() < 0.3 else status


def _blind_candidate(**seen: Any) -> Any:
    return REAL.horizon_candidate(**{**seen, "resources": ()})


def _greedy_candidate(**seen: Any) -> Any:
    return REAL.horizon_candidate(**{**seen, "retention_ms": 0, "alive": {}})


def _core(**methods: Any) -> Parts:
    return REAL._replace(transaction=mutant(**methods))


BUGS: tuple[Bug, ...] = (
    *OF_SERVERS,
    Bug(
        "commit-before-decision",
        "the decision is recorded before any branch commits",
        _core(rules=_EARLY_ENDS, _all_voted=_commit_at_once, _finished=_tolerant_finished),
    ),
    Bug(
        "absent-is-permission",
        "nothing recorded is no permission to roll back",
        REAL._replace(sweeper=around.AbsentIsAbort),
    ),
    Bug(
        "sweep-presumes-abort",
        "the sweep asks the log and obeys",
        REAL._replace(sweeper=around.PresumesAbort),
    ),
    Bug(
        "error-is-abort",
        "an error of the log is indefinite",
        REAL._replace(driver=around.ErrorIsAbort),
    ),
    Bug("refused-is-abort", "refused is not abort", _core(_refused=_roll_back_when_refused)),
    Bug(
        "deadline-rolls-back",
        "an abort after a commit proposal is decided by the log only",
        _core(_abort_while_commit_is_proposed=_roll_back_at_deadline),
    ),
    Bug(
        "handed-abort-unrecorded",
        "who handed the votes on cannot abort without a record",
        _core(_abort=_abort_unrecorded),
    ),
    Bug(
        "last-writer-wins", "the register is written once", REAL._replace(register=_LastWriterWins)
    ),
    Bug(
        "horizon-outside-the-write",
        "the horizon is compared in the write",
        REAL._replace(register=_HorizonUnchecked, driver=around.ComparesBefore),
    ),
    Bug("horizon-falls", "the horizon only rises", REAL._replace(register=_HorizonFalls)),
    Bug("forget-unfinished", "unfinished records stay", REAL._replace(register=_ForgetsUnfinished)),
    Bug(
        "forget-above-horizon",
        "records above the horizon stay",
        REAL._replace(register=_ForgetsAboveHorizon),
    ),
    Bug(
        "any-log",
        "a sweep acts only on its own log's branches",
        REAL._replace(resource=around.ListsAllLogs),
    ),
    Bug(
        "one-phase-published",
        "one phase only while the id is private",
        _core(_commit_requested=_always_one_phase),
    ),
    Bug("one-phase-claimed", "one phase never under a key", _core(__init__=_claimed_is_private)),
    Bug(
        "delegation-beside",
        "the delegation stands before the last resource is asked",
        _core(
            rules={(Phase.COMMIT_PROPOSED, around.Answered): Transaction._answered_delegated},
            _all_voted=_ask_beside_the_register,
        ),
    ),
    Bug(
        "answer-unrecorded",
        "the last resource's answer stands before a branch is touched",
        _core(_answered_delegated=_touch_before_the_answer_stands),
    ),
    Bug(
        "commit-all-prepared",
        "a commit covers exactly the branches it names",
        _core(_commit=_commit_all_prepared),
    ),
    Bug(
        "first-vote-decides",
        "a commit needs every vote",
        _core(
            rules={(Phase.COMMIT_PROPOSED, Voted): Transaction._remember_vote},
            _voted=_believe_the_first_vote,
        ),
    ),
    Bug("no-counts-as-reading", "one no aborts", _core(_voted=_count_no_as_read_only)),
    Bug(
        "readers-end-early",
        "a read-only branch ends after the decision",
        _core(rules=_EARLY_ENDS, _voted=_end_readers_with_their_vote, _finished=_tolerant_finished),
    ),
    Bug(
        "tokens-lost",
        "what a stranger needs is recorded with the decision",
        _core(_branch=_forget_tokens),
    ),
    Bug(
        "heuristic-swallowed",
        "a heuristic ending is reported",
        _core(_finished=_swallow_heuristics),
    ),
    Bug(
        "mark-before-end", "a branch is marked after it acknowledged", _core(_commit=_mark_at_once)
    ),
    Bug(
        "acknowledge-early",
        "committed is told after the log answered",
        REAL._replace(teller=around.TellsEarly),
    ),
    Bug(
        "unknown-is-aborted",
        "what is not known is told as unknown",
        REAL._replace(teller=around.TellsUnknownAsAborted),
    ),
    Bug(
        "key-by-lease",
        "the next attempt waits for a recorded abort",
        REAL._replace(caller=around.MovesByLease),
    ),
    Bug(
        "key-by-lease-alone",
        "a key's commit takes its claim in the same write",
        REAL._replace(caller=around.MovesByLease, register=_ClaimsUnchecked),
    ),
    Bug(
        "key-goes-with-record",
        "keys outlive the horizon",
        REAL._replace(register=_KeysGoWithRecords, caller=around.CallsLate),
    ),
    Bug(
        "refused-key-runs-again",
        "after a refusal the claim is read, and a held key takes no name",
        REAL._replace(caller=around.RunsAgainWhenRefused, register=around.NamesUnderHeldKeys),
    ),
    Bug(
        "key-named-blindly",
        "a key's name moves by compare-and-set",
        REAL._replace(register=around.NamesBlindly),
    ),
    Bug(
        "quarantine-unseen",
        "after a refusal the branch is looked at again",
        REAL._replace(sweeper=around.QuarantinesUnseen),
    ),
    Bug(
        "refusal-ignored",
        "what the log has forgotten is shown to a person",
        REAL._replace(sweeper=around.IgnoresRefusal),
    ),
    Bug(
        "unknown-name-is-done",
        "an unknown name is done only if no PREPARE may still land",
        REAL._replace(resource=around.UnknownIsDone),
    ),
    Bug(
        "clear-marks-ignored",
        "the horizon waits for what the resources' sweeps saw",
        REAL._replace(horizon_candidate=_blind_candidate),
    ),
    Bug(
        "no-retention",
        "the horizon stays the retention behind",
        REAL._replace(horizon_candidate=_greedy_candidate),
        first_seed=400,
    ),
    Bug(
        "live-while-beating",
        "a transaction is live only within its deadline",
        REAL._replace(watch=around.BeatingIsLive),
    ),
    Bug("no-sweep", "the sweep is part of the protocol", REAL._replace(sweeper=around.NeverSweeps)),
    Bug(
        "absence-reads-aborted",
        "absence never reads as aborted",
        REAL._replace(status=_absent_is_aborted),
    ),
    Bug(
        "stale-status",
        "a status is never read from a follower",
        REAL._replace(status=_from_a_follower),
    ),
    Bug(
        "both-answers",
        "exactly one answer of a request is enlisted",
        REAL._replace(remote=around.EnlistsBoth),
    ),
    Bug(
        "given-up-enlisted",
        "an answer to a request that was given up is dropped",
        REAL._replace(remote=around.EnlistsGivenUp),
        first_seed=900,
    ),
    Bug(
        "parked-hides-unnamed",
        "a branch that was seen is driven, whatever waits for a person",
        REAL._replace(sweeper=around.ParksWholly),
    ),
    Bug(
        "quarantine-stops-forgetting",
        "a quarantined branch holds no horizon back",
        REAL._replace(sweeper=around.CountsQuarantined),
    ),
)

BY_NAME = {bug.name: bug for bug in BUGS}
__all__ = ["ABORT", "BUGS", "BY_NAME", "Bug", "Decided", "Outcome"]
